"""norm_linear: linear attention without a denominator, normed (TransNormer, Qin et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from passes.decode_form import LinearStreaming, Stepped, Tensors
from passes.form import FormSpec, Paper, Params, Verdict
from passes.forms._features import Pair, count, wide
from passes.forms._linear import (
    elu1_ops,
    fused,
    linear_attention_ops,
    linear_verdict,
    sizes,
)
from passes.forms._sums import HUGE, linear_sum
from passes.opcount import OpCount
from passes.site import AttentionSite

NORM_EPS = 1e-6


class NormLinear(LinearStreaming):
    """RMS norm, over all heads of a token, of phi(q) (phi(k)^T v) with phi = 1 + elu.

    A denominator's gradient is not bounded; the norm's is. The output of every token has the same
    size, which no softmax has: made to be trained. The paper takes it for the later layers and
    `diag_block` for the early ones. `weights` are phi(q) phi(k) of the visible keys, before the
    norm. Dropout on weights has no counterpart. 16-bit data is summed and normed in float32.
    """

    name = "norm_linear"
    family = "kernelised"
    paper = Paper(
        "Qin, Han, Sun, Li, Kong, Barnes, Zhong",
        "The Devil in Linear Transformer",
        2022,
        "https://arxiv.org/abs/2210.10340",
    )
    formula = "RMSNorm(phi(q) (phi(k)^T v)) over heads and channels,  phi(x) = elu(x) + 1"
    needs = "training"
    normalised = False
    eps = HUGE  # the denominator of a step: none, as in `linear_sum`

    def applies(self, site: AttentionSite) -> Verdict:
        """Causal and padding masks, cross attention, grouped heads; no bias, window or tensor."""
        return linear_verdict(site, self.name)

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
        """Normed sums [B, H, T, E]."""
        out = linear_sum(_phi(q), _phi(k), v, key_mask=key_mask, causal=spec.causal)
        return _normed(out).to(v.dtype)

    def features(self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor) -> Pair:
        """elu + 1 of either."""
        return _phi(q), _phi(k)

    def width(self, site: AttentionSite) -> int:
        """D."""
        return site.dims.D

    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> Pair:
        """Two maps."""
        return kit.elu1(q), kit.elu1(k)

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
        """The sums of the new tokens and the state, normed."""
        out, new = super().step(spec, params, q, k, wide(v), state, position)
        return _normed(out * HUGE).to(v.dtype), new

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
        """The step's sums, then the norm; all in float32."""
        dtype, v = kit.dtype(v), kit.cast(v, "float32")
        out, new = super().step_kernel(kit, spec, params, q, k, v, state, position)
        return kit.cast(kit.token_norm(out, scale=HUGE, eps=NORM_EPS), dtype), new

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """phi(q) phi(k) of the visible keys [B, H, T, S]; rows do not sum to one."""
        eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
        values = eye.expand(*k.shape[:2], -1, -1)
        sums = linear_sum(_phi(q), _phi(k), values, key_mask=key_mask, causal=spec.causal)
        return sums.to(q.dtype)

    def ops(self, site: AttentionSite) -> OpCount:
        """Feature maps and sums in one kernel, then the norm.

        norm: mul 3 (take the factor of the sums back, square, apply), add 1 for each value;
        for each token mul and add (mean, eps), sqrt, div.
        """
        b, h, g, t, s, d, e = sizes(site)
        maps = elu1_ops(b * h * t * d, site) + elu1_ops(b * g * s * d, site)
        n, tokens = b * h * t * e, b * t
        norm = count(site, n, mul=3 * n + tokens, add=n + tokens, sqrt=tokens, div=tokens)
        return fused(maps + linear_attention_ops(site, d), site) + norm

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
        """Sums and norm."""
        dtype = kit.dtype(v)
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        out = kit.linear_sum(kit.elu1(q), kit.elu1(k), v, key_mask=key_mask, causal=spec.causal)
        return kit.cast(kit.token_norm(out, scale=HUGE, eps=NORM_EPS), dtype)


def _normed(out: torch.Tensor) -> torch.Tensor:
    return out * (out.square().mean((1, 3), keepdim=True) + NORM_EPS).rsqrt()


def _phi(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.elu(wide(x)) + 1.0
