"""relu: linear attention with the feature map max(x, 0) (Cai et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from passes.form import FormSpec, Paper, Params
from passes.forms._features import FeatureForm, Pair, relu, relu_ops
from passes.forms._linear import sizes
from passes.opcount import OpCount
from passes.site import AttentionSite

FLOOR = 1e-6


class Relu(FeatureForm):
    """phi(x) = max(x, 0) + 1e-6 on query and key: no parameters, no scale.

    The floor makes a query or key without positive channels an even average instead of 0 / 0.
    Made for models trained with it; in place of a trained softmax it averages almost evenly.
    """

    name = "relu"
    paper = Paper(
        "Cai, Li, Hu, Gan, Han",
        "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction",
        2023,
        "https://arxiv.org/abs/2205.14756",
    )
    formula = "phi(q) (phi(k)^T v) / phi(q) sum(phi(k)),  phi(x) = max(x, 0)"
    needs = "training"

    def features(self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor) -> Pair:
        """The positive parts."""
        return relu(q, FLOOR), relu(k, FLOOR)

    def width(self, site: AttentionSite) -> int:
        """D."""
        return site.dims.D

    def map_ops(self, site: AttentionSite) -> OpCount:
        """Both maps."""
        b, h, g, t, s, d, _ = sizes(site)
        return relu_ops(b * h * t * d, site) + relu_ops(b * g * s * d, site)

    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> tuple[Any, Any]:
        """Two maps."""
        return kit.relu(q, FLOOR), kit.relu(k, FLOOR)
