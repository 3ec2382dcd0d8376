"""taylor: second order Taylor features of the exponential (Based, Arora et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from passes.errors import UsageError
from passes.form import FormConfig, FormSpec, Paper, Params
from passes.forms._features import (
    Pair,
    WideFeatureForm,
    polynomial,
    polynomial_ops,
    polynomial_width,
    project,
    root,
)
from passes.forms._linear import project_ops, sizes
from passes.forms._random import subspace
from passes.opcount import OpCount
from passes.site import AttentionSite


@dataclass(frozen=True)
class TaylorConfig(FormConfig):
    """`rank` d: query and key are projected to d channels (0: all D, starting as the identity).

    There are 1 + d + d (d + 1) / 2 features: 153 for 16, 2145 for 64.
    """

    rank: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or not 0 <= self.rank <= 256:
            raise UsageError(f"rank: a whole number from 0 to 256, got {self.rank}")


class Taylor(WideFeatureForm):
    """Weights 1 + t + t^2/2 of t = scale (q w_q).(k w_k): exp(t) to second order, at least 1/2.

    `w_q` [H, D, d] and `w_k` [G, D, d] start as one random subspace per group, lengthened so that
    t is right on average. With `rank` 0 nothing is lost before a fit: close to softmax for logits
    within about 1, and no use beyond (large negative logits weigh as much as positive ones).
    """

    name = "taylor"
    paper = Paper(
        "Arora, Eyuboglu, Zhang, Timalsina, Alberti, Zinsley, Zou, Rudra, Re",
        "Simple linear attention language models balance the recall-throughput tradeoff",
        2024,
        "https://arxiv.org/abs/2402.18668",
    )
    formula = "phi(q) (phi(k)^T v) / phi(q) sum(phi(k)),  phi(q) phi(k) = 1 + t + t^2/2"
    trainable = True
    needs = "short fit"
    Config = TaylorConfig

    def _rank(self, site: AttentionSite) -> int:
        assert isinstance(self.config, TaylorConfig)
        return min(self.config.rank or site.dims.D, site.dims.D)

    def width(self, site: AttentionSite) -> int:
        """1 + d + d (d + 1) / 2."""
        return polynomial_width(self._rank(site), low=True)

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """`w_q` [H, D, d], `w_k` [G, D, d]; a group's query heads start as its key head."""
        d, rank = site.dims, self._rank(site)
        longer = math.sqrt(d.D / rank)
        w = torch.stack([subspace(d.D, rank, g) * longer for g in range(d.G)]).float()
        return {"w_q": w.repeat_interleave(d.H // d.G, 0), "w_k": w}

    def features(self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor) -> Pair:
        """1, channels and their products."""
        scale = root(spec.scale)
        return (
            polynomial(project(q, params["w_q"], scale), low=True),
            polynomial(project(k, params["w_k"], scale), low=True),
        )

    def map_ops(self, site: AttentionSite) -> OpCount:
        """Projections and products."""
        b, h, g, t, s, d, _ = sizes(site)
        rank, scaled, total = self._rank(site), root(site.scale) != 1.0, OpCount()
        for rows, heads in ((b * h * t, h), (b * g * s, g)):
            total += project_ops(rows, heads, d, rank, scaled=scaled, site=site)
            total += polynomial_ops(rows, rank, site, low=True)
        return total

    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> tuple[Any, Any]:
        """Project and multiply."""
        scale = root(spec.scale)
        yq, yk = kit.project(q, params["w_q"], scale), kit.project(k, params["w_k"], scale)
        return kit.polynomial(yq, low=True), kit.polynomial(yk, low=True)
