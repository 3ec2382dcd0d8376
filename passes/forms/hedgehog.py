"""hedgehog: linear attention with a learned softmax feature map (Zhang et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from passes.decode_form import LinearStreaming
from passes.errors import UsageError
from passes.form import FormConfig, FormSpec, Paper, Params, Verdict
from passes.forms._linear import (
    accumulate_dtype,
    fused,
    linear_attention,
    linear_attention_ops,
    linear_verdict,
    linear_weights,
    project_ops,
    sizes,
    softmax_pair_ops,
)
from passes.opcount import OpCount
from passes.site import AttentionSite

LEAST = 64  # of the learned map's width, by default
EPS = 1e-12  # the features are normalised, so their product can be honestly small


@dataclass(frozen=True)
class HedgehogConfig(FormConfig):
    """`feature_dim` R is the width of the learned map, and 2 R the number of features.

    0 stands for the larger of D and 64: narrow heads need more features than they have channels
    (MiniLM, D 32, same fit: 1 - mean cosine 0.039 with 32, 0.031 with 64). The cost is in
    proportion.
    """

    feature_dim: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.feature_dim, int) or not 0 <= self.feature_dim <= 1024:
            raise UsageError(f"feature_dim: a whole number from 0 to 1024, got {self.feature_dim}")


class Hedgehog(LinearStreaming):
    """phi(x) = [softmax(y), softmax(-y)] with y = sqrt(scale) x W, W learned per head.

    `w_q` [H, D, R] and `w_k` [G, D, R] start as an identity, and rotations of it beyond D columns;
    query heads of one key/value group share the group's key map, so the state stays one per
    group. Dropout on attention weights has no counterpart and is ignored.
    """

    name = "hedgehog"
    family = "kernelised"
    paper = Paper(
        "Zhang, Bhatia, Kumbong, Re",
        "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        2024,
        "https://arxiv.org/abs/2402.04347",
    )
    formula = "phi(q) (phi(k)^T v) / phi(q) sum(phi(k)),  phi(x) = [softmax(x W), softmax(-x W)]"
    trainable = True
    needs = "short fit"
    Config = HedgehogConfig
    eps = EPS

    def features(
        self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax pairs of the learned maps."""
        return _phi(q, params["w_q"], spec), _phi(k, params["w_k"], spec)

    def width(self, site: AttentionSite) -> int:
        """2 R."""
        return 2 * self._width(site)

    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> tuple[Any, Any]:
        """Project and softmax pair."""
        root = _root(spec.scale)
        return (
            kit.softmax_pair(kit.project(q, params["w_q"], scale=root)),
            kit.softmax_pair(kit.project(k, params["w_k"], scale=root)),
        )

    def applies(self, site: AttentionSite) -> Verdict:
        """Causal and padding masks; no bias, no window, no mask tensor."""
        return linear_verdict(site, self.name)

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """`w_q` [H, D, R], `w_k` [G, D, R]."""
        d = site.dims
        start = _start(d.D, self._width(site))
        return {"w_q": start.repeat(d.H, 1, 1), "w_k": start.repeat(d.G, 1, 1)}

    def _width(self, site: AttentionSite) -> int:
        config = self.config
        assert isinstance(config, HedgehogConfig)
        return config.feature_dim or max(site.dims.D, LEAST)

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
        fq, fk = _phi(q, params["w_q"], spec), _phi(k, params["w_k"], spec)
        return linear_attention(fq, fk, v, key_mask=key_mask, causal=spec.causal, eps=EPS)

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
        fq, fk = _phi(q, params["w_q"], spec), _phi(k, params["w_k"], spec)
        return linear_weights(fq, fk, spec, key_mask, EPS).to(q.dtype)

    def ops(self, site: AttentionSite) -> OpCount:
        """Projections and softmax pairs of q and k, then linear attention with 2 R features."""
        b, h, g, t, s, d, _ = sizes(site)
        r, scaled = self._width(site), _root(site.scale) != 1.0
        total = linear_attention_ops(site, 2 * r)
        for rows, heads in ((b * h * t, h), (b * g * s, g)):
            total += project_ops(rows, heads, d, r, scaled=scaled, site=site)
            total += softmax_pair_ops(rows, r, site)
        return fused(total, site, (h + g) * d * r)

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
        """Project, softmax pair, sums."""
        fq, fk = self.map_kernels(kit, spec, params, q, k)
        return kit.linear_attention(fq, fk, v, key_mask=key_mask, causal=spec.causal, eps=EPS)


def _start(d: int, r: int) -> torch.Tensor:
    """[D, R]: an identity, then orthogonal rotations (fixed ones), cut to R columns."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.eye(d)]
    while len(parts) * d < r:
        parts.append(torch.linalg.qr(torch.randn(d, d, generator=generator))[0])
    return torch.cat(parts, 1)[:, :r]


def _root(scale: float) -> float:
    return math.sqrt(abs(scale))


def _phi(x: torch.Tensor, w: torch.Tensor, spec: FormSpec) -> torch.Tensor:
    wide = accumulate_dtype(x.dtype)
    y = (x.to(wide) @ w.to(wide)) * _root(spec.scale)
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)
