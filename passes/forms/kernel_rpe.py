"""kernel_rpe: linear features times a relative position bias (Luo et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from passes.errors import UsageError
from passes.form import Form, FormConfig, FormSpec, Paper, Params, Reason, Verdict, no
from passes.forms._linear import (
    elu1_ops,
    group_verdict,
    linear_verdict,
    project_ops,
    sizes,
    softmax_pair_ops,
    visible,
)
from passes.forms._relative_ops import block_ops, pair_ops
from passes.forms._rows import scores, times_values
from passes.forms.elu import Elu
from passes.forms.favor import Favor
from passes.forms.hedgehog import Hedgehog
from passes.opcount import OpCount
from passes.ops import HIDDEN
from passes.relative import by_difference, differences, places, relative_product
from passes.site import AttentionSite

EPS = 1e-30  # factors may make a whole row small
BLOCKS = 5  # of tokens from which on the linear way is faster
LONG = 2048  # tokens from which on torch multiplies by Fourier transforms
WIDE = 1 << 22  # values of one Fourier transform
MAPS = ("hedgehog", "elu", "favor")


@dataclass(frozen=True)
class KernelRpeConfig(FormConfig):
    """`map`: whose features; `reach`: distance from which on learned offsets are one number a side.

    `features` is the map's own option (`feature_dim` of hedgehog, `features` of favor; 0: its own
    choice). `reach` is at least that of the site's bias.
    """

    map: str = "hedgehog"
    features: int = 0
    reach: int = 64

    def __post_init__(self) -> None:
        if self.map not in MAPS:
            raise UsageError(f"map: one of {', '.join(MAPS)}, got {self.map!r}")
        for name, least in (("features", 0), ("reach", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 8192:
                raise UsageError(f"{name}: a whole number from {least} to 8192, got {value!r}")


class KernelRpe(Form):
    """Weights phi(q_i).phi(k_j) e^(b_{j - i}), divided by their sum.

    b is the site's own bias, read from its mask tensor at every call (so a trained table stays
    trained), which must depend on j - i alone or on the difference of cells of a grid
    (`Mask.relative`), plus `offset` [H, N], which starts at 0 and is fitted; where the site has no
    bias, `offset` alone. Such a sum over keys is a convolution of R (E + 1) channels, R features,
    by Fourier transforms in time T log T (torch does so for long inputs), which for R = 128 needs
    fewer operations than pairs of tokens only from some thousand on. Compiled code has a faster way
    where b is one number on each side from a distance w on (T5's buckets, and `offset`): keys in
    neighbouring blocks of w tokens one by one, all others by running sums, linear in the tokens but
    for reading the bias (0.77, 0.45 and 0.29 of the time of exact attention with T5's bias at 1024,
    2048 and 4096 tokens, on one core with AVX-512). Where that does not help (a grid, few tokens, a
    bias without such an end) it multiplies pairs. The paper normalises q and k; this map keeps
    their norms.
    """

    name = "kernel_rpe"
    family = "kernelised"
    paper = Paper(
        "Luo, Li, Cai, He, Peng, Zheng, Ke, Wang, Liu",
        "Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding",
        2021,
        "https://arxiv.org/abs/2106.12566",
    )
    formula = "sum_j phi(q_i).phi(k_j) e^(b_{j-i}) v_j / sum_j phi(q_i).phi(k_j) e^(b_{j-i})"
    trainable = True
    needs = "short fit"
    Config = KernelRpeConfig

    def __init__(self, config: FormConfig | Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        self._map = _map(self.options.map, self.options.features)

    @property
    def options(self) -> KernelRpeConfig:
        """The config by its own type."""
        assert isinstance(self.config, KernelRpeConfig)
        return self.config

    def applies(self, site: AttentionSite) -> Verdict:
        """Causal and padding masks, and a float bias of differences of places; T = S or causal."""
        mask = site.mask
        if site.cross or site.reduced or (site.dims.T != site.dims.S and not mask.causal):
            return no(
                Reason.CROSS,
                f"{site.id}: queries and keys are not the same tokens, so their distance means "
                "nothing",
            )
        if mask.bias and mask.relative is not None and not mask.unknown:
            return group_verdict(site)
        if mask.bias and not mask.unknown:
            return no(
                Reason.MASK_BIAS,
                f"the bias of {site.id} is not a number for each j - i, nor for each difference on "
                f"a grid, for all keys; {self.name} takes no other",
            )
        return linear_verdict(site, self.name)

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """The map's own and `offset` [H, N]: N = 2 reach + 1, or the differences of a grid."""
        grid = _grid(site.mask.relative)
        number = differences(grid, 0, 0) if grid else 2 * self.reach(site.mask.relative) + 1
        return {**self._map.init_params(site), "offset": torch.zeros(site.dims.H, number)}

    def reach(self, relative: tuple[int, ...] | None) -> int:
        """The distance from which on all offsets of a side are one number."""
        return max(self.options.reach, *(relative if relative and len(relative) == 1 else (1,)))

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
        """Attention [B, H, T, E]; by Fourier transforms from `LONG` tokens on."""
        if max(q.shape[2], k.shape[2]) < LONG:
            return times_values(self._weights(spec, params, q, k, key_mask, bias), v).to(q.dtype)
        fq, fk = self._map.features(spec, params, q, k)
        grid = _grid(spec.relative)
        logits = self._logits(spec, params, q.shape[2], k.shape[2], bias)
        table = by_difference(logits, grid)
        table = (table - table.amax(-1, keepdim=True).clamp_min(HIDDEN / 2)).exp()
        if bias is not None:
            key_mask = (bias > HIDDEN / 2).reshape(-1, *bias.shape[-3:]).any(1).any(1)
        if key_mask is not None:
            fk = fk.masked_fill(~key_mask[:, None, :, None], 0.0)
        group = q.shape[1] // k.shape[1]
        values = F.pad(v.to(fk.dtype), (0, 1), value=1.0).repeat_interleave(group, 1)
        both = convolved(table.to(fk.dtype), fq, fk.repeat_interleave(group, 1), values, grid)
        return (both[..., :-1] / both[..., -1:].clamp_min(EPS)).to(q.dtype)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weights [B, H, T, S]."""
        return self._weights(spec, params, q, k, key_mask, bias).to(q.dtype)

    def _weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        fq, fk = self._map.features(spec, params, q, k)
        logits = self._logits(spec, params, q.shape[2], k.shape[2], bias)
        peak = logits.amax((-1, -2), keepdim=True).clamp_min(HIDDEN / 2)
        rows = scores(fq, fk, 1.0) * (logits - peak).exp().to(fq.dtype)
        if key_mask is not None:
            rows = rows.masked_fill(~key_mask[:, None, None], 0.0)
        return rows / rows.sum(-1, keepdim=True).clamp_min(EPS)

    def _logits(
        self, spec: FormSpec, params: Params, queries: int, keys: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """b [B or 1, H, T, S]; -inf where causality hides."""
        offset, grid = params["offset"], _grid(spec.relative)
        at = places(grid, queries, keys).to(offset.device)
        if grid is None:  # the last query stands at the last key
            reach = offset.shape[1] // 2
            at = (at - (keys - 1)).clamp(-reach, reach) + reach
        logits = offset[:, at][None]
        seen = visible(spec, queries, keys, offset.device)
        if seen is not None:
            logits = logits.masked_fill(~seen, -torch.inf)
        return logits if bias is None else logits + bias

    def block(self, relative: tuple[int, ...] | None, queries: int, keys: int) -> int:
        """Tokens of a block for the linear way, 0 where pairs of tokens are multiplied."""
        size = -(-(self.reach(relative) - 1) // 16) * 16 or 16
        return 0 if _grid(relative) or queries != keys or queries < BLOCKS * size else size

    def ops(self, site: AttentionSite) -> OpCount:
        """The features, and `pair_ops` or `block_ops` of as many as there are."""
        _, _, _, t, s, _, _ = sizes(site)
        size, r = self.block(site.mask.relative, t, s), self._map.width(site)
        products = block_ops(site, r, size) if size else pair_ops(site, r)
        return self._map_ops(site) + products

    def _map_ops(self, site: AttentionSite) -> OpCount:
        b, h, g, t, s, d, _ = sizes(site)
        if isinstance(self._map, Favor):
            return self._map.map_ops(site)
        if isinstance(self._map, Elu):
            return elu1_ops(b * h * t * d, site) + elu1_ops(b * g * s * d, site)
        r, scaled = self._map.width(site) // 2, site.scale != 1.0
        total = OpCount()
        for rows, heads in ((b * h * t, h), (b * g * s, g)):
            total += project_ops(rows, heads, d, r, scaled=scaled, site=site)
            total += softmax_pair_ops(rows, r, site)
        return total

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
        """Features, then factors and one kernel of rows, or a table and blocks."""
        dtype = kit.dtype(q)
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        fq, fk = self._map.map_kernels(kit, spec, params, q, k)
        offset, tokens = kit.cast(params["offset"], "float32"), (kit.tokens(q), kit.tokens(k))
        size = self.block(spec.relative, *tokens)
        if size:
            out = kit.relative_attention(
                fq, fk, v, offset, bias, key_mask=key_mask, causal=spec.causal, block=size
            )
            return kit.cast(out, dtype)
        factors = kit.relative_factors(
            offset, bias, grid=_grid(spec.relative), tokens=tokens, causal=spec.causal
        )
        return kit.cast(kit.product_attention(fq, fk, v, factors, key_mask=key_mask), dtype)


def _map(name: str, features: int) -> Hedgehog | Elu | Favor:
    if name == "favor":
        return Favor({"features": features})
    return Elu() if name == "elu" else Hedgehog({"feature_dim": features})


def _grid(relative: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The grid of `Mask.relative`, None for a line."""
    return relative if relative is not None and len(relative) > 1 else None


def convolved(
    table: torch.Tensor,
    fq: torch.Tensor,
    fk: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, ...] | None,
) -> torch.Tensor:
    """sum_j fq_i.fk_j table_{j - i} v_j [B, H, T, E] by Fourier transforms, some features a time.

    table [B or 1, H, N], fq [B, H, T, R], fk [B, H, S, R], v [B, H, S, E].
    """
    features, width = fk.shape[-1], v.shape[-1]
    step = max(1, WIDE // (fk.shape[:-1].numel() * width))
    total = torch.zeros(1, dtype=v.dtype, device=v.device)
    for first in range(0, features, step):
        some = fk[..., first : first + step, None] * v[..., None, :]
        mixed = relative_product(table, some.flatten(-2), grid)
        mixed = mixed.reshape(*mixed.shape[:-1], -1, width)
        total = total + (fq[..., first : first + step, None] * mixed).sum(-2)
    return total
