"""gated: softmax attention times a learned gate of the token and head (Bondarenko et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from passes.decode_form import CachedStreaming
from passes.errors import UsageError
from passes.form import FormConfig, FormSpec, Paper, Params, Verdict
from passes.forms._linear import accumulate_dtype, count_dtype, group_verdict, item_bytes, sizes
from passes.forms._random import gaussian
from passes.forms.exact import Exact
from passes.opcount import OpCount
from passes.site import AttentionSite

SPREAD = 0.01  # of the gate's first weights, as in the paper's fine-tuning


@dataclass(frozen=True)
class GatedConfig(FormConfig):
    """`share`: what the gate lets through at first; the output is divided by it."""

    share: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.share, int | float) or not 0.01 <= self.share <= 0.99:
            raise UsageError(f"share: a number from 0.01 to 0.99, got {self.share!r}")


class Gated(CachedStreaming):
    """Softmax attention with every mask, times sigmoid(q.w + b) / share for each query and head.

    A head can do nothing without large logits. `w` [H, D] starts near 0 and `b` [H, 1] at
    logit(share), where the gate is 1: a trained model is kept and learns the gate by fine-tuning.
    The paper gates by the layer's input, of which the query is a linear map per head.
    """

    name = "gated"
    family = "exact"
    paper = Paper(
        "Bondarenko, Nagel, Blankevoort",
        "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
        2023,
        "https://arxiv.org/abs/2306.12929",
    )
    formula = "sigmoid(q w + b) / share * softmax(scale * q k^T + bias) v"
    trainable = True
    needs = "short fit"
    normalised = False
    Config = GatedConfig

    @property
    def _share(self) -> float:
        assert isinstance(self.config, GatedConfig)
        return float(self.config.share)

    def applies(self, site: AttentionSite) -> Verdict:
        """Every mask, cross attention and grouped heads, as exact attention."""
        return group_verdict(site)

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """`w` [H, D], `b` [H, 1]."""
        d, start = site.dims, math.log(self._share / (1.0 - self._share))
        w = SPREAD * gaussian(d.H, d.D, 0).float()
        return {"w": w, "b": torch.full((d.H, 1), start)}

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
        """Gated attention [B, H, T, E]."""
        out = Exact().attend(spec, {}, q, k, v, key_mask, bias)
        return (out * self._gate(params, q)).to(q.dtype)

    def _gate(self, params: Params, q: torch.Tensor) -> torch.Tensor:
        """[B, H, T, 1], in the type sums are kept in."""
        wide = accumulate_dtype(q.dtype)
        w, b = params["w"].to(wide), params["b"].to(wide)
        opened = (q.to(wide) @ w[..., None] + b[:, None]).sigmoid()
        return opened / self._share

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gated softmax weights [B, H, T, S]; their sum is the gate."""
        soft = Exact().weights(spec, {}, q, k, key_mask, bias)
        return (soft * self._gate(params, q)).to(q.dtype)

    def ops(self, site: AttentionSite) -> OpCount:
        """Exact attention; then for each row mul and add D, add, the sigmoid (exp, add, div), mul.

        Outputs are multiplied by the gate: mul B*H*T*E.
        """
        b, h, _, t, _, d, e = sizes(site)
        rows, size = b * h * t, item_bytes(site)
        return Exact().ops(site) + OpCount.of(
            count_dtype(site),
            mul=rows * (d + 1 + e),
            add=rows * (d + 2),
            exp=rows,
            div=rows,
            read=(rows * (d + e) + h * (d + 1)) * size,
            written=rows * e * size,
        )

    def counted(self, site: AttentionSite) -> OpCount:
        """EcoFormer's rule and the gate: mul B*H*T*(D + E), add B*H*T*D."""
        b, h, _, t, _, d, e = sizes(site)
        return Exact().counted(site) + OpCount.of(mul=b * h * t * (d + e), add=b * h * t * d)

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
        """Exact attention, then the gate."""
        out = Exact().kernel(kit, spec, {}, q, k, v, key_mask, bias)
        return kit.gate(out, q, params["w"], params["b"], gain=1.0 / self._share)

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
        """Exact attention's step, then the gate."""
        out, new = Exact().step_kernel(kit, spec, {}, q, k, v, state, position)
        return kit.gate(out, q, params["w"], params["b"], gain=1.0 / self._share), new
