"""rebased: a learnable quadratic kernel (ReBased, Aksenov et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from passes.errors import UsageError
from passes.form import FormConfig, FormSpec, Paper, Params, Reason, Verdict, no
from passes.forms._features import (
    Pair,
    WideFeatureForm,
    head_norm,
    head_norm_ops,
    polynomial,
    polynomial_ops,
    polynomial_width,
    project,
)
from passes.forms._linear import project_ops, sizes
from passes.forms._random import subspace
from passes.opcount import OpCount
from passes.site import AttentionSite

NORM_EPS = 1e-5
FLOOR = 1e-3


@dataclass(frozen=True)
class RebasedConfig(FormConfig):
    """`rank` d: query and key are projected to d channels (0: all D).

    There are 1 + d (d + 1) / 2 features.
    """

    rank: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank == 1 or not 0 <= self.rank <= 256:
            raise UsageError(f"rank: 0 or a whole number from 2 to 256, got {self.rank}")


class Rebased(WideFeatureForm):
    """Weights (q'.k')^2 with q', k' layer normed with their own gamma and beta per head.

    Beta moves the parabola's lowest point, so a weight can be learned to be about 0 (which Taylor's
    polynomial can not give). Not quite 0: a thousandth of an average weight is added to each, or
    a row of small weights would be a quotient of roundings, of any sign and size. `w_q` [H, D, d]
    and `w_k` [G, D, d] start as one random subspace per group, gamma as 1, beta as 0. The norm
    discards the size of q and k: made to be trained.
    """

    name = "rebased"
    paper = Paper(
        "Aksenov, Balagansky, Lo Cicero Vaina, Shaposhnikov, Gorbatovski, Gavrilov",
        "Linear Transformers with Learnable Kernel Functions are Better In-Context Models",
        2024,
        "https://arxiv.org/abs/2402.10644",
    )
    formula = "phi(q) (phi(k)^T v) / phi(q) sum(phi(k)),  phi(q) phi(k) = (LN(q W) . LN(k W))^2"
    trainable = True
    needs = "training"
    Config = RebasedConfig

    def applies(self, site: AttentionSite) -> Verdict:
        """As the linear forms; a head of one channel has nothing to norm."""
        if site.dims.D < 2:
            return no(Reason.HEAD_DIM, f"{site.id} has heads of one channel; the norm gives 0")
        return super().applies(site)

    def _rank(self, site: AttentionSite) -> int:
        assert isinstance(self.config, RebasedConfig)
        return min(self.config.rank or site.dims.D, site.dims.D)

    def width(self, site: AttentionSite) -> int:
        """1 + d (d + 1) / 2."""
        return polynomial_width(self._rank(site), low=False)

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """`w_q` [H, D, d], `gamma_q`, `beta_q` [H, d] and the same for k with G."""
        d, rank = site.dims, self._rank(site)
        w = torch.stack([subspace(d.D, rank, g) for g in range(d.G)]).float()
        params = {"w_q": w.repeat_interleave(d.H // d.G, 0), "w_k": w}
        for name, heads in (("q", d.H), ("k", d.G)):
            params[f"gamma_{name}"] = torch.ones(heads, rank)
            params[f"beta_{name}"] = torch.zeros(heads, rank)
        return params

    def features(self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor) -> Pair:
        """Products of normed channels."""
        fq, fk = (
            polynomial(
                head_norm(
                    project(x, params[f"w_{n}"]),
                    params[f"gamma_{n}"],
                    params[f"beta_{n}"],
                    NORM_EPS,
                ),
                low=False,
                flat=_flat_of(params["gamma_q"].shape[-1]),
            )
            for n, x in (("q", q), ("k", k))
        )
        return fq, fk

    def map_ops(self, site: AttentionSite) -> OpCount:
        """Projections, norms and products."""
        b, h, g, t, s, d, _ = sizes(site)
        rank, total = self._rank(site), OpCount()
        for rows, heads in ((b * h * t, h), (b * g * s, g)):
            total += project_ops(rows, heads, d, rank, scaled=False, site=site)
            total += head_norm_ops(rows, rank, heads, site)
            total += polynomial_ops(rows, rank, site, low=False)
        return total

    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> tuple[Any, Any]:
        """Project, norm, multiply."""
        flat = _flat_of(kit.last(params["gamma_q"]))
        fq, fk = (
            kit.polynomial(
                kit.head_norm(
                    kit.project(x, params[f"w_{n}"]),
                    params[f"gamma_{n}"],
                    params[f"beta_{n}"],
                    NORM_EPS,
                ),
                low=False,
                flat=flat,
            )
            for n, x in (("q", q), ("k", k))
        )
        return fq, fk


def _flat_of(rank: int) -> float:
    """A feature whose square is `FLOOR` of an average weight, rank / 2."""
    return math.sqrt(FLOOR * rank / 2)
