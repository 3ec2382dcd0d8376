"""lolcats: softmax in a window and a learned linear remainder (Zhang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.decode_form import StateSpec, Stepped, Streaming, Tensors
from passes.errors import FormError, UsageError
from passes.form import FormSpec, Paper, Params, Reason, Verdict, no
from passes.forms._features import count, project, root, wide
from passes.forms._linear import (
    count_dtype,
    linear_verdict,
    project_ops,
    sizes,
    softmax_pair_ops,
    visible,
)
from passes.forms._near import Heads, ring_state, ring_step
from passes.forms._window import Blocks
from passes.forms.exact import Exact
from passes.forms.hedgehog import LEAST, Hedgehog, HedgehogConfig
from passes.opcount import OpCount
from passes.site import AttentionSite

EPS = 1e-12
SHARE = -2.197  # its sigmoid is 0.1, the paper's start


@dataclass(frozen=True)
class LolcatsConfig(HedgehogConfig):
    """`window`: tokens of a block; `feature_dim` R as in hedgehog (2 R features)."""

    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.window, int) or self.window < 1:
            raise UsageError(f"window: a whole number from 1, got {self.window}")


class Lolcats(Streaming):
    """Softmax terms for keys near a query, hedgehog features for the rest, one denominator.

    Near are the query's own block of `window` tokens and its neighbours (causal: the one before;
    the paper's terraced window). Their terms exp(scale q.k - maximum near) are multiplied by
    sigmoid(`mix`), a weight per head that starts at 0.1; the others are phi(q).phi(k) with the
    maps `w_q` [H, D, R], `w_k` [G, D, R]. All of them train. Up to two blocks all keys are near,
    and it is softmax attention itself. Token by token the last two blocks are held, older ones are
    sums. Dropout on attention weights has no counterpart.
    """

    name = "lolcats"
    family = "kernelised"
    trainable = True
    needs = "short fit"
    paper = Paper(
        "Zhang, Arora, Chalamala, Wu, Spector, Singhal, Ramesh, Re",
        "LoLCATs: On Low-Rank Linearizing of Large Language Models",
        2024,
        "https://arxiv.org/abs/2410.10254",
    )
    formula = (
        "sum_j w_ij v_j / sum_j w_ij,  w_ij = sigmoid(g) exp(scale q k - max) near, "
        "phi(q) phi(k) far"
    )
    Config = LolcatsConfig

    @property
    def _window(self) -> int:
        assert isinstance(self.config, LolcatsConfig)
        return self.config.window

    def applies(self, site: AttentionSite) -> Verdict:
        """Causal and padding masks, grouped heads; queries and keys must be the same tokens."""
        if site.cross or site.dims.T != site.dims.S:
            return no(
                Reason.CROSS,
                f"{site.id}: queries and keys are not the same tokens, so no key is near a query",
            )
        return linear_verdict(site, self.name)

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """`w_q` [H, D, R], `w_k` [G, D, R], `mix` [H]."""
        maps = Hedgehog({"feature_dim": self._width(site)}).init_params(site)
        return {**maps, "mix": torch.full((site.dims.H,), SHARE)}

    def _width(self, site: AttentionSite) -> int:
        assert isinstance(self.config, LolcatsConfig)
        return self.config.feature_dim or max(site.dims.D, LEAST)

    def _all_near(self, tokens: int) -> bool:
        return tokens <= 2 * self._window

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
        """Hybrid attention [B, H, T, E], linear in T; FormError if T is not S."""
        if k.shape[2] != q.shape[2]:
            raise FormError(f"lolcats got {q.shape[2]} queries and {k.shape[2]} keys")
        if self._all_near(q.shape[2]):
            return _joined(Exact().attend(_exact(spec), {}, q, k, v, key_mask), params)
        fq, fk = (_phi(x, params[n], spec) for n, x in (("w_q", q), ("w_k", k)))
        share = params["mix"].to(fq.dtype).sigmoid()
        blocks = Blocks(self._window, spec, q, k, v, key_mask)
        return blocks.attend(fq, fk, share, EPS).to(v.dtype)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weights [B, H, T, S]; quadratic."""
        tokens = q.shape[2]
        if self._all_near(tokens):
            return _joined(Exact().weights(_exact(spec), {}, q, k, key_mask), params)
        fq, fk = (_phi(x, params[n], spec) for n, x in (("w_q", q), ("w_k", k)))
        group = q.shape[1] // k.shape[1]
        fk, keys = (x.repeat_interleave(group, 1) for x in (fk, wide(k)))
        block = torch.arange(tokens, device=q.device) // self._window
        near = (block[:, None] - block).abs() <= 1
        seen = visible(spec, tokens, tokens, q.device)
        seen = torch.ones_like(near) if seen is None else seen
        if key_mask is not None:
            seen = seen & key_mask[:, None, None, :]
        logits = (wide(q) @ keys.transpose(-1, -2)) * spec.scale
        logits = logits.masked_fill(~(seen & near), -torch.inf)
        top = logits.amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0.0)
        share = params["mix"].to(fq.dtype).sigmoid()[:, None, None]
        far = (fq @ fk.transpose(-1, -2)).masked_fill(~(seen & ~near), 0.0)
        both = share * (logits - top).exp() + far
        return (both / both.sum(-1, keepdim=True).clamp_min(EPS)).to(q.dtype)

    def ops(self, site: AttentionSite) -> OpCount:
        """Softmax's count where all keys are near, else the maps and the kernel.

        N = 2 C keys near a query (3 C without a causal mask), C the window, n blocks:
        share           exp, add, div for each head
        key mask        mul B*G*T*F  (F = 2 R; only with a padding mask)
        states          mul and add B*G*n*C*F*E, add B*G*n*C*F
        sums of states  add B*G*(n - 2)*F*(E + 1), two times more if not causal
        scale           mul B*H*T*D (not for scale 1)
        near            mul and add B*H*T*N*(D + E), and for each of the B*H*T*N pairs select, max,
                        add, exp, add
        far             mul and add B*H*T*F*(E + 1)
        rows            mul E + 1, max 2 (a comparison, the clamp), select 1, div E for B*H*T rows
        """
        b, h, g, t, _, d, e = sizes(site)
        if self._all_near(t):
            return Exact().ops(site)
        r, c = self._width(site), self._window
        f, n, near = 2 * r, -(-t // c), (2 if site.mask.causal else 3) * c
        total, rows, keys = OpCount(), b * h * t, b * g * t
        for number, heads in ((rows, h), (keys, g)):
            scaled = root(site.scale) != 1.0
            total += project_ops(number, heads, d, r, scaled=scaled, site=site)
            total += softmax_pair_ops(number, r, site)
        pairs, states = rows * near, b * g * n * c * f
        passes = 1 if site.mask.causal else 3
        joined = passes * b * g * (n - 2) * f * (e + 1)
        read = rows * (d + f) + keys * (d + e + f) + h
        kernel = count(
            site,
            rows * e,
            read,
            mul=pairs * (d + e) + states * e + rows * (f * (e + 1) + e + 1)
            + (rows * d if site.scale != 1.0 else 0)
            + (keys * f if site.mask.padding else 0),
            add=pairs * (d + e + 2) + states * (e + 1) + joined + rows * f * (e + 1) + h,
            select=pairs + rows,
            max=pairs + 2 * rows,
            exp=pairs + h,
            div=rows * e + h,
        )  # fmt: skip
        mask = OpCount.of(count_dtype(site), read=b * t if site.mask.padding else 0)
        return total + kernel + mask

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
        """Exact attention where all keys are near, else maps and the hybrid kernel."""
        if self._all_near(kit.tokens(q)):
            return kit.exact_attention(
                q, k, v, key_mask=key_mask, causal=spec.causal, scale=spec.scale
            )
        scale = root(spec.scale)
        fq = kit.softmax_pair(kit.project(q, params["w_q"], scale=scale))
        fk = kit.softmax_pair(kit.project(k, params["w_k"], scale=scale))
        return kit.hybrid(
            q, k, v, fq, fk, params["mix"], key_mask=key_mask, causal=spec.causal,
            scale=spec.scale, block=self._window, eps=EPS,
        )  # fmt: skip

    def state(self, site: AttentionSite, length: int) -> tuple[StateSpec, ...]:
        """Two blocks of keys and values and the sums of 2 R features, whatever the length."""
        return ring_state(site, self._window, 2 * self._width(site))

    def step(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        state: Tensors,
        position: torch.Tensor,
    ) -> Stepped:
        """Softmax over what the ring holds near, features for what has left it."""
        batch, groups = k.shape[:2]
        tokens = q.shape[2]
        fq, fk = (_phi(x, params[n], spec) for n, x in (("w_q", q), ("w_k", k)))
        share = params["mix"].to(fq.dtype).sigmoid().reshape(groups, -1)
        rows, fq = (x.reshape(batch, groups, -1, tokens, x.shape[-1]) for x in (wide(q), fq))
        heads = Heads(rows, wide(k), wide(v), fq, fk, share)
        out, new = ring_step(
            heads, state, int(position[0, 0]), window=self._window, scale=spec.scale, eps=EPS
        )
        return out.flatten(1, 2).to(v.dtype), new

    def step_kernel(
        self,
        kit: Any,
        spec: FormSpec,
        params: Mapping[str, Any],
        q: Any,
        k: Any,
        v: Any,
        state: Sequence[Any],
        position: Any,
    ) -> tuple[Any, list[Any]]:
        """Feature maps, then one kernel that turns the ring and reads it; all in float32."""
        dtype, scale = kit.dtype(v), root(spec.scale)
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        fq = kit.softmax_pair(kit.project(q, params["w_q"], scale=scale))
        fk = kit.softmax_pair(kit.project(k, params["w_k"], scale=scale))
        out, *new = kit.hybrid_step(
            q, k, v, fq, fk, params["mix"], state, position,
            scale=spec.scale, window=self._window, eps=EPS,
        )  # fmt: skip
        return kit.cast(out, dtype), new


def _phi(x: torch.Tensor, w: torch.Tensor, spec: FormSpec) -> torch.Tensor:
    y = project(x, w, root(spec.scale))
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


def _joined(out: torch.Tensor, params: Params) -> torch.Tensor:
    """`out` with the unused parameters in its graph: a fit finds their gradient 0, not missing."""
    used = [p.sum() for p in params.values() if p.requires_grad]
    return out + 0.0 * torch.stack(used).sum().to(out.dtype) if used else out


def _exact(spec: FormSpec) -> FormSpec:
    return FormSpec(Exact.name, spec.causal, spec.scale)
