"""favor: positive orthogonal random features of the softmax kernel (Choromanski et al. 2021)."""

from __future__ import annotations

import math
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
    relu,
    relu_ops,
    root,
)
from passes.forms._linear import project_ops, sizes
from passes.opcount import OpCount
from passes.site import AttentionSite

FLOOR = 1e-12  # keeps keys that underflow an even average
RELU_FLOOR = 1e-3  # of the paper's generalised attention
KINDS = ("exp", "relu")


@dataclass(frozen=True)
class FavorConfig(FormConfig):
    """`features` R, `kind` "exp" (estimates softmax) or "relu" (generalised attention).

    R is D ln D, rounded up to vectors of 16, for 0. `orthogonal` false draws plain Monte Carlo
    directions; `seed` fixes the draw.
    """

    features: int = 0
    kind: str = "exp"
    orthogonal: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.features, int) or not 0 <= self.features <= 8192:
            raise UsageError(f"features: a whole number from 0 to 8192, got {self.features}")
        if self.kind not in KINDS:
            raise UsageError(f"kind: one of {', '.join(KINDS)}, got {self.kind!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"seed: a whole number from 0, got {self.seed}")


class Favor(WideFeatureForm):
    """phi(x) = exp(w.x - |x|^2/2) for R directions w; an unbiased estimate of exp(scale q.k).

    Queries are stabilised by the maximum of their own row; keys need nothing (the exponent is
    bounded by |w|^2/2), so no token or sequence touches another one's features. The variance grows
    like exp(scale |q + k|^2): good for heads with small q and k, poor for peaked ones. The
    directions `w` [G, D, R] are parameters: saved with the model, and a fit trains them (it is
    then no longer an unbiased estimate).
    """

    name = "favor"
    paper = Paper(
        "Choromanski, Likhosherstov, Dohan, Song, Gane, Sarlos, Hawkins, Davis, Mohiuddin, "
        "Kaiser, Belanger, Colwell, Weller",
        "Rethinking Attention with Performers",
        2021,
        "https://arxiv.org/abs/2009.14794",
    )
    formula = "phi(q) (phi(k)^T v) / phi(q) sum(phi(k)),  phi(x) = exp(w x - |x|^2/2), w ~ N(0, I)"
    trainable = True
    needs = "nothing"
    eps = 1e-30
    Config = FavorConfig

    @property
    def _config(self) -> FavorConfig:
        assert isinstance(self.config, FavorConfig)
        return self.config

    def width(self, site: AttentionSite) -> int:
        """R."""
        d = site.dims.D
        wanted = max(int(d * math.log(d)), d, 1)
        return self._config.features or (-(-wanted // 16) * 16 if wanted > 16 else wanted)

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """`w` [G, D, R]: query heads of a group meet the group's keys in the same directions."""
        draw = _random.orthogonal if self._config.orthogonal else _random.gaussian
        d, r, seed = site.dims.D, self.width(site), self._config.seed
        groups = [draw(d, r, seed * 4096 + g) for g in range(site.dims.G)]
        return {"w": torch.stack(groups).float()}

    def features(self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor) -> Pair:
        """Random features."""
        yq, yk = (project(x, params["w"], root(spec.scale)) for x in (q, k))
        if self._config.kind == "relu":
            return relu(yq, RELU_FLOOR), relu(yk, RELU_FLOOR)
        return exp_query(yq), exp_key(yk, k, abs(spec.scale), FLOOR)

    def map_ops(self, site: AttentionSite) -> OpCount:
        """Projections and maps; the projections read one weight per group."""
        b, h, g, t, s, d, _ = sizes(site)
        r, scaled, qt, kt = self.width(site), root(site.scale) != 1.0, b * h * t, b * g * s
        total = project_ops(qt, g, d, r, scaled=scaled, site=site)
        total += project_ops(kt, g, d, r, scaled=scaled, site=site)
        if self._config.kind == "relu":
            return total + relu_ops(qt * r, site) + relu_ops(kt * r, site)
        return total + exp_query_ops(qt, r, site) + exp_key_ops(kt, d, r, site)

    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> tuple[Any, Any]:
        """Project and map."""
        scale = root(spec.scale)
        yq, yk = (kit.shared_project(x, params["w"], scale) for x in (q, k))
        if self._config.kind == "relu":
            return kit.relu(yq, RELU_FLOOR), kit.relu(yk, RELU_FLOOR)
        return kit.exp_query(yq), kit.exp_key(yk, k, scale=abs(spec.scale), floor=FLOOR)
