"""linformer: softmax attention over keys and values pooled by learned maps (Wang et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from passes.errors import FormError, UsageError
from passes.form import Form, FormConfig, FormSpec, Paper, Params, Reason, Verdict, no
from passes.forms._landmarks import landmark_verdict, share_of
from passes.forms._linear import accumulate_dtype, count_dtype, item_bytes, sizes
from passes.forms._rows import times_values
from passes.forms.exact import Exact
from passes.opcount import OpCount
from passes.site import AttentionSite, Mask

MOST = 256  # slots, by default


@dataclass(frozen=True)
class LinformerConfig(FormConfig):
    """`rank` r: slots that keys and values are pooled into; 0: a quarter of the keys, up to 256."""

    rank: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise UsageError(f"rank: a whole number from 0, got {self.rank!r}")


class Linformer(Form):
    """softmax(scale q (E k)^T + slot) (F v): E, F [G, r, S] and slot [G, r] learned per key head.

    They start as means of runs of neighbouring keys and the log of the runs' lengths, which is
    softmax for as many slots as keys, and near it where neighbours are alike. The maps belong to
    one number of keys (a shorter input takes their first columns). Of a slot only the visible part
    counts: its sum is divided by that part of |E| (|F|), whose log is added to its logit.
    """

    name = "linformer"
    family = "low-rank"
    paper = Paper(
        "Wang, Li, Khabsa, Fang, Ma",
        "Linformer: Self-Attention with Linear Complexity",
        2020,
        "https://arxiv.org/abs/2006.04768",
    )
    formula = "softmax(scale * q (E k)^T + slot) (F v)"
    trainable = True
    needs = "short fit"
    normalised = False
    Config = LinformerConfig

    def applies(self, site: AttentionSite) -> Verdict:
        """Padding masks, cross attention, grouped heads; a fixed number of keys, no causality."""
        verdict = landmark_verdict(site, self.name)
        if verdict and not isinstance(site.dims.S, int):
            return no(
                Reason.LENGTH,
                f"{site.id} has {site.dims.S!r} keys, a size that changes; {self.name} learns maps "
                "for one number of keys (trace without dynamic shapes)",
            )
        return verdict

    def _rank(self, keys: int) -> int:
        assert isinstance(self.config, LinformerConfig)
        return min(self.config.rank or min(-(-keys // 4), MOST), keys)

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """`e`, `f` [G, r, S], `slot` [G, r]."""
        keys = int(site.dims.S)
        share = share_of(keys, self._rank(keys))[0]
        lengths = (share > 0).sum(-1)
        maps = share.float().repeat(site.dims.G, 1, 1)
        slot = lengths.log().float().repeat(site.dims.G, 1)
        return {"e": maps, "f": maps.clone(), "slot": slot}

    def attend(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention [B, H, T, E]; FormError for more keys than the maps are for."""
        wide = accumulate_dtype(q.dtype)
        slots = self._slots(spec, params, q.to(wide), k.to(wide), key_mask)
        pooled = _pool(params["f"].to(wide), v.to(wide), key_mask)[0]
        return times_values(slots, pooled).to(q.dtype)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weights of slots times F [B, H, T, S]; their sum is one while rows of F sum to one."""
        wide = accumulate_dtype(q.dtype)
        slots = self._slots(spec, params, q.to(wide), k.to(wide), key_mask)
        each = torch.eye(k.shape[2], dtype=wide, device=k.device).expand(*k.shape[:2], -1, -1)
        return times_values(slots, _pool(params["f"].to(wide), each, key_mask)[0]).to(q.dtype)

    def _slots(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Softmax weights of the slots [B, H, T, r]."""
        pooled, coverage = _pool(params["e"].to(k.dtype), k, key_mask)
        seen = coverage > 0
        bias = params["slot"].to(k.dtype) + torch.where(seen, coverage, 1.0).log()
        bias = bias.masked_fill(~seen, -torch.inf)
        bias = bias.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None]
        inner = FormSpec(Exact.name, False, spec.scale)
        return Exact().weights(inner, {}, q, pooled, None, bias)

    def ops(self, site: AttentionSite) -> OpCount:
        """Pooled keys and values, exact attention of r keys with a bias; with a mask coverage.

        pooling    mul and add B*G*r*S*(D + E)
        coverage   3 times (for keys, values and logits) abs 2 and add 2 and select 1 for each of
                   B*G*r*S (selects of the two poolings once more), and B*G*r div and max; of the
                   first two mul B*G*r*(D + E), of the last log, add, select, 2 max more
        """
        b, _, g, _, s, d, e = sizes(site)
        r, size, dtype = self._rank(s), item_bytes(site), count_dtype(site)
        slots = b * g * r
        pooled = OpCount.of(
            dtype,
            mul=slots * s * (d + e),
            add=slots * s * (d + e),
            read=(b * g * s * (d + e) + 2 * g * r * s) * size,
            written=slots * (d + e) * size,
        )
        inner = replace(site, dims=replace(site.dims, S=r), mask=Mask(bias=True))
        total = pooled + Exact().ops(inner)
        if not site.mask.padding:
            return total
        return total + OpCount.of(
            dtype,
            abs=6 * slots * s,
            add=6 * slots * s + slots,
            select=5 * slots * s + slots,
            div=3 * slots,
            max=5 * slots,
            log=slots,
            mul=slots * (d + e),
            read=(g * r * s + g * r) * size + 3 * b * s,
            written=slots * size,
        )

    def counted(self, site: AttentionSite) -> OpCount:
        """EcoFormer's rule: the poolings, and softmax attention of r keys."""
        b, _, g, _, s, d, e = sizes(site)
        r = self._rank(s)
        n = b * g * r * s * (d + e)
        return OpCount.of(mul=n, add=n) + Exact().counted(
            replace(site, dims=replace(site.dims, S=r))
        )

    def kernel(
        self,
        kit: Any,
        spec: FormSpec,
        params: Mapping[str, Any],
        q: Any,
        k: Any,
        v: Any,
        key_mask: Any = None,
        bias: Any = None,
    ) -> Any:
        """Two poolings, the slots' bias, exact attention."""
        dtype = kit.dtype(q)
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        e, f, slot = (kit.cast(params[n], "float32") for n in ("e", "f", "slot"))
        keys, values = kit.pool(k, e, key_mask), kit.pool(v, f, key_mask)
        slots = kit.repeat_heads(kit.slot_bias(e, slot, kit.batch(q), key_mask), kit.heads(q))
        return kit.cast(kit.exact_attention(q, keys, values, bias=slots, scale=spec.scale), dtype)


def _pool(
    w: torch.Tensor, x: torch.Tensor, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots [B, G, r, D], their coverage [B or 1, G, r]) of x [B, G, S, D] by w [G, r, M >= S]."""
    keys = x.shape[2]
    if keys > w.shape[2]:
        raise FormError(f"linformer's maps are for up to {w.shape[2]} keys, and there are {keys}")
    whole, w = w.abs().sum(-1), w[..., :keys]
    part = w[None]
    if key_mask is not None:
        part = part * key_mask[:, None, None].to(w.dtype)
        x = x.masked_fill(~key_mask[:, None, :, None], 0.0)
    coverage = part.abs().sum(-1) / whole.clamp_min(1e-30)
    return part @ x / torch.where(coverage > 0, coverage, 1.0)[..., None], coverage
