"""dijiang: a weighted quasi-Monte Carlo set of DCT directions (Chen et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from passes.errors import UsageError
from passes.form import FormConfig, FormSpec, Paper, Params
from passes.forms import _random
from passes.forms._features import (
    Pair,
    WideFeatureForm,
    exp_key,
    exp_key_ops,
    exp_query,
    exp_query_ops,
    project,
    root,
)
from passes.forms._linear import project_ops, sizes
from passes.opcount import OpCount
from passes.site import AttentionSite

FLOOR = 1e-12  # keeps keys that underflow an even average


@dataclass(frozen=True)
class DijiangConfig(FormConfig):
    """`features` R (0: 2 D, one pair of directions for each frequency); `seed` deals lengths."""

    features: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.features, int) or not 0 <= self.features <= 8192:
            raise UsageError(f"features: a whole number from 0 to 8192, got {self.features}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"seed: a whole number from 0, got {self.seed}")


class Dijiang(WideFeatureForm):
    """Positive features of exp(scale q.k) over w = DCT frequencies at stratified Gaussian lengths.

    Where random features draw w, here the directions are the orthonormal DCT and its negative (with
    signs changed for more than 2 D features) and the lengths quantiles, and each feature has a
    weight. Both are parameters, saved with the model: `w` [G, D, R] and the log weights
    `log_weight` [G, R], which start at 0 (even weights); a fit trains them. As a drop-in this keeps
    the denominator of attention; the decay and the gate of the paper's retrained models are left
    out. The transform is a dense product here.
    """

    name = "dijiang"
    paper = Paper(
        "Chen, Liu, Wang, Tian, Wang",
        "DiJiang: Efficient Large Language Models through Compact Kernelization",
        2024,
        "https://arxiv.org/abs/2403.19928",
    )
    formula = (
        "phi(q) (phi(k)^T v) / phi(q) sum(phi(k)),  phi(x) = d exp(t C x - |x|^2/2), C the DCT"
    )
    trainable = True
    needs = "training"
    eps = 1e-30
    Config = DijiangConfig

    @property
    def _config(self) -> DijiangConfig:
        assert isinstance(self.config, DijiangConfig)
        return self.config

    def width(self, site: AttentionSite) -> int:
        """R."""
        return self._config.features or 2 * site.dims.D

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """`w` [G, D, R], `log_weight` [G, R]."""
        d, r, seed = site.dims, self.width(site), self._config.seed
        groups = [_random.cosine_points(d.D, r, seed * 4096 + g) for g in range(d.G)]
        return {"w": torch.stack(groups).float(), "log_weight": torch.zeros(d.G, r)}

    def features(self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor) -> Pair:
        """Weighted positive features; the weights are on the side of the queries."""
        yq, yk = (project(x, params["w"], root(spec.scale)) for x in (q, k))
        return exp_query(yq, params["log_weight"]), exp_key(yk, k, abs(spec.scale), FLOOR)

    def map_ops(self, site: AttentionSite) -> OpCount:
        """Projections, exponentials."""
        b, h, g, t, s, d, _ = sizes(site)
        r, scaled, qt, kt = self.width(site), root(site.scale) != 1.0, b * h * t, b * g * s
        total = project_ops(qt, g, d, r, scaled=scaled, site=site)
        total += project_ops(kt, g, d, r, scaled=scaled, site=site)
        return total + exp_query_ops(qt, r, site, g * r) + exp_key_ops(kt, d, r, site)

    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> tuple[Any, Any]:
        """Project and map."""
        scale = root(spec.scale)
        yq, yk = (kit.shared_project(x, params["w"], scale) for x in (q, k))
        fk = kit.exp_key(yk, k, scale=abs(spec.scale), floor=FLOOR)
        return kit.exp_query(yq, params["log_weight"]), fk
