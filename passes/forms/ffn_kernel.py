"""ffn_kernel: a small trainable feed-forward network as feature map (Yorsh, Kovalenko 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from passes.errors import UsageError
from passes.form import FormConfig, FormSpec, Paper, Params
from passes.forms._features import FeatureForm, Pair, count, project, root
from passes.forms._linear import (
    elu1_ops,
    fused,
    linear_attention_ops,
    project_ops,
    sizes,
)
from passes.forms._random import subspace
from passes.opcount import OpCount
from passes.site import AttentionSite


@dataclass(frozen=True)
class FfnKernelConfig(FormConfig):
    """`hidden` units of the network and its `features` R; 0 stands for D."""

    hidden: int = 0
    features: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "features"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value <= 1024:
                raise UsageError(f"{name}: a whole number from 0 to 1024, got {value}")


class FfnKernel(FeatureForm):
    """phi(x) = elu(y) + 1, y = (x w_in * sigmoid(x w_gate)) w_out, learned per head.

    A gated linear unit between two orthogonal maps, separate for query ([H, ..]) and key ([G, ..]).
    It starts as `elu`: the gate even at one half, the maps orthonormal (w_out twice that). Here
    elu + 1 keeps the features positive.
    """

    name = "ffn_kernel"
    paper = Paper(
        "Yorsh, Kovalenko",
        "Linear Self-Attention Approximation via Trainable Feedforward Kernel",
        2022,
        "https://arxiv.org/abs/2211.04076",
    )
    formula = (
        "phi(q) (phi(k)^T v) / phi(q) sum(phi(k)),  phi(x) = elu((x W1 * sigmoid(x W2)) W3) + 1"
    )
    trainable = True
    needs = "training"
    eps = 1e-6
    Config = FfnKernelConfig

    def _hidden(self, site: AttentionSite) -> int:
        assert isinstance(self.config, FfnKernelConfig)
        return self.config.hidden or site.dims.D

    def width(self, site: AttentionSite) -> int:
        """R."""
        assert isinstance(self.config, FfnKernelConfig)
        return self.config.features or site.dims.D

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """`in_x`, `gate_x` [H or G, D, hidden], `out_x` [H or G, hidden, R] for x in q, k."""
        d, hidden, r = site.dims.D, self._hidden(site), self.width(site)
        params = {}
        for name, heads in (("q", site.dims.H), ("k", site.dims.G)):
            params[f"in_{name}"] = _orthonormal(d, hidden).repeat(heads, 1, 1)
            params[f"gate_{name}"] = torch.zeros(heads, d, hidden)
            params[f"out_{name}"] = 2 * _orthonormal(hidden, r).repeat(heads, 1, 1)
        return params

    def features(self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor) -> Pair:
        """The network's outputs, made positive."""
        scale = root(spec.scale)
        fq, fk = (
            project(
                project(x, params[f"in_{n}"], scale)
                * project(x, params[f"gate_{n}"], scale).sigmoid(),
                params[f"out_{n}"],
            )
            for n, x in (("q", q), ("k", k))
        )
        return torch.nn.functional.elu(fq) + 1.0, torch.nn.functional.elu(fk) + 1.0

    def map_ops(self, site: AttentionSite) -> OpCount:
        """Three products and a gate (exp, add, div, mul for each hidden unit)."""
        b, h, g, t, s, d, _ = sizes(site)
        hidden, r, scaled = self._hidden(site), self.width(site), root(site.scale) != 1.0
        total = OpCount()
        for rows, heads in ((b * h * t, h), (b * g * s, g)):
            n = rows * hidden
            total += project_ops(rows, heads, d, hidden, scaled=scaled, site=site) * 2
            total += count(site, n, 2 * n, exp=n, add=n, div=n, mul=n)
            total += project_ops(rows, heads, hidden, r, scaled=False, site=site)
        return total

    def ops(self, site: AttentionSite) -> OpCount:
        """The networks, then elu + 1 and the sums in one kernel."""
        b, h, g, t, s, _, _ = sizes(site)
        r = self.width(site)
        inner = replace(site, dims=replace(site.dims, D=r))
        maps = elu1_ops(b * h * t * r, site) + elu1_ops(b * g * s * r, site)
        return self.map_ops(site) + fused(maps + linear_attention_ops(inner, r), inner)

    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> tuple[Any, Any]:
        """Two products, the gate, a product, elu + 1."""
        scale = root(spec.scale)
        fq, fk = (
            kit.elu1(
                kit.project(
                    kit.glu(
                        kit.project(x, params[f"in_{n}"], scale),
                        kit.project(x, params[f"gate_{n}"], scale),
                    ),
                    params[f"out_{n}"],
                )
            )
            for n, x in (("q", q), ("k", k))
        )
        return fq, fk


def _orthonormal(rows: int, columns: int) -> torch.Tensor:
    """Orthonormal columns (rows where there are more columns); the identity where square."""
    if columns > rows:
        return subspace(columns, rows, 0).T.float()
    return subspace(rows, columns, 0).float()
