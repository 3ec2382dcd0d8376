"""clipped_softmax: softmax stretched and clipped, with exact zeros (Bondarenko et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.decode_form import CachedStreaming
from passes.errors import UsageError
from passes.form import FormConfig, FormSpec, Paper, Params, Verdict
from passes.forms._linear import accumulate_dtype, count_dtype, group_verdict, sizes
from passes.forms._rows import times_values
from passes.forms.exact import Exact
from passes.opcount import OpCount
from passes.site import AttentionSite


@dataclass(frozen=True)
class ClippedSoftmaxConfig(FormConfig):
    """`zeta` >= 1 and `gamma` <= 0: the range softmax is stretched to before it is clipped.

    The paper trains with zeta 1 and gamma -a / T, a from 3 to 12 and T the longest input; every
    weight below -gamma / (zeta - gamma) becomes 0.
    """

    zeta: float = 1.0
    gamma: float = -0.005

    def __post_init__(self) -> None:
        for name in ("zeta", "gamma"):
            if isinstance(getattr(self, name), bool) or not isinstance(
                getattr(self, name), int | float
            ):
                raise UsageError(f"{name}: a number, got {getattr(self, name)!r}")
        if not 1.0 <= self.zeta <= 16.0:
            raise UsageError(f"zeta: a number from 1 to 16, got {self.zeta}")
        if not -16.0 <= self.gamma <= 0.0:
            raise UsageError(f"gamma: a number from -16 to 0, got {self.gamma}")


class ClippedSoftmax(CachedStreaming):
    """Weights clip((zeta - gamma) softmax + gamma, 0, 1), with every mask and bias.

    A head can do nothing without large logits, which keeps activations small enough for 8 bits.
    Rows no longer sum to one, and clipped weights pass no gradient. Made for training; with a
    gamma far below one over the number of keys a trained model hardly changes.
    """

    name = "clipped_softmax"
    family = "exact"
    paper = Paper(
        "Bondarenko, Nagel, Blankevoort",
        "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
        2023,
        "https://arxiv.org/abs/2306.12929",
    )
    formula = "clip((zeta - gamma) softmax(scale * q k^T + bias) + gamma, 0, 1) v"
    needs = "training"
    normalised = False
    Config = ClippedSoftmaxConfig

    @property
    def _range(self) -> tuple[float, float]:
        assert isinstance(self.config, ClippedSoftmaxConfig)
        return float(self.config.zeta), float(self.config.gamma)

    def applies(self, site: AttentionSite) -> Verdict:
        """Every mask, cross attention and grouped heads, as exact attention."""
        return group_verdict(site)

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
        """Clipped attention [B, H, T, E]."""
        return times_values(self._weights(spec, q, k, key_mask, bias), v).to(q.dtype)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Clipped weights [B, H, T, S]; their sum is not one."""
        return self._weights(spec, q, k, key_mask, bias).to(q.dtype)

    def _weights(
        self,
        spec: FormSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        wide = accumulate_dtype(q.dtype)
        zeta, gamma = self._range
        soft = Exact().weights(spec, {}, q.to(wide), k.to(wide), key_mask, bias)
        # A hidden key has weight 0, and gamma is not above 0: it stays hidden.
        return ((zeta - gamma) * soft + gamma).clamp(0.0, 1.0)

    def ops(self, site: AttentionSite) -> OpCount:
        """Exact attention, less the division of outputs, and the change of each weight.

        div 1 for each row; mul, add and 2 max for each pair of a query and a key.
        """
        b, h, _, t, s, _, e = sizes(site)
        exact, rows = Exact().ops(site), b * h * t
        pairs, dtype = rows * s, count_dtype(site)
        ops = dict(exact.ops)
        ops["div", dtype] -= rows * e
        kept = OpCount(ops, exact.bytes_read, exact.bytes_written)
        return kept + OpCount.of(dtype, div=rows, mul=pairs, add=pairs, max=2 * pairs)

    def counted(self, site: AttentionSite) -> OpCount:
        """EcoFormer's rule, under which what is done to softmax weights is free."""
        return Exact().counted(site)

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
        """One kernel; weights of eight queries at a time."""
        zeta, gamma = self._range
        return kit.clipped_attention(
            q,
            k,
            v,
            zeta=zeta,
            gamma=gamma,
            key_mask=key_mask,
            bias=bias,
            causal=spec.causal,
            window=spec.window,
            scale=spec.scale,
        )

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
        """One kernel whose work follows the position."""
        left = None if spec.window is None else spec.window[0]
        out, *new = kit.attention_step(
            q, k, v, *state, position, scale=spec.scale, left=left, clip=self._range
        )
        return out, new
