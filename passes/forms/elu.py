"""elu: linear attention with the feature map elu(x) + 1 (Katharopoulos et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from passes.decode_form import LinearStreaming
from passes.form import FormSpec, Paper, Params, Verdict
from passes.forms._linear import (
    accumulate_dtype,
    elu1_ops,
    fused,
    linear_attention,
    linear_attention_ops,
    linear_verdict,
    linear_weights,
    sizes,
)
from passes.opcount import OpCount
from passes.site import AttentionSite

EPS = 1e-6


class Elu(LinearStreaming):
    """phi(x) = elu(x) + 1 on query and key, no parameters, no scale.

    Made for models trained with it: in place of a trained softmax it averages almost evenly.
    Dropout on attention weights has no counterpart and is ignored.
    """

    name = "elu"
    family = "kernelised"
    paper = Paper(
        "Katharopoulos, Vyas, Pappas, Fleuret",
        "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        2020,
        "https://arxiv.org/abs/2006.16236",
    )
    formula = "phi(q) (phi(k)^T v) / phi(q) sum(phi(k)),  phi(x) = elu(x) + 1"
    needs = "training"
    eps = EPS

    def features(
        self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """phi(q), phi(k)."""
        return _phi(q), _phi(k)

    def width(self, site: AttentionSite) -> int:
        """D."""
        return site.dims.D

    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> tuple[Any, Any]:
        """Two maps."""
        return kit.elu1(q), kit.elu1(k)

    def applies(self, site: AttentionSite) -> Verdict:
        """Causal and padding masks; no bias, no window, no mask tensor."""
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
        """Linear attention [B, H, T, E]."""
        return linear_attention(_phi(q), _phi(k), v, key_mask=key_mask, causal=spec.causal, eps=EPS)

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
        return linear_weights(_phi(q), _phi(k), spec, key_mask, EPS).to(q.dtype)

    def ops(self, site: AttentionSite) -> OpCount:
        """Feature maps of q and k, then linear attention with D features."""
        b, h, g, t, s, d, _ = sizes(site)
        maps = elu1_ops(b * h * t * d, site) + elu1_ops(b * g * s * d, site)
        return fused(maps + linear_attention_ops(site, d), site)

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
        """Two feature maps and the sums."""
        return kit.linear_attention(
            kit.elu1(q), kit.elu1(k), v, key_mask=key_mask, causal=spec.causal, eps=EPS
        )


def _phi(x: torch.Tensor) -> torch.Tensor:
    return F.elu(x.to(accumulate_dtype(x.dtype))) + 1.0
