"""cosformer: a positive map reweighted by the cosine of the distance (Qin et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from passes.decode_form import StateSpec
from passes.errors import FormError, InputError, UsageError
from passes.form import FormConfig, FormSpec, Paper, Params, Reason, Verdict, no
from passes.forms._features import FeatureForm, Pair, count, relu
from passes.forms._linear import sizes
from passes.opcount import OpCount
from passes.site import AttentionSite

FLOOR = 1e-6


@dataclass(frozen=True)
class CosformerConfig(FormConfig):
    """`span` m: tokens m apart weigh 0. Fixed up front, at least the number of tokens.

    It is no length of the input: features of earlier tokens may not change when tokens come.
    """

    span: int = 1024

    def __post_init__(self) -> None:
        if not isinstance(self.span, int) or self.span < 1:
            raise UsageError(f"span: a whole number from 1, got {self.span}")


class Cosformer(FeatureForm):
    """Weights relu(q_i).relu(k_j) cos(pi (i - j) / (2 m)), split into sine and cosine features.

    Positions: key j is at j; query i is at i, in causal attention at i + S - T. In cross
    attention the two counts of positions are compared as they are. No parameters, no scale.
    """

    name = "cosformer"
    paper = Paper(
        "Qin, Sun, Deng, Li, Wei, Lv, Yan, Kong, Zhong",
        "cosFormer: Rethinking Softmax in Attention",
        2022,
        "https://arxiv.org/abs/2202.08791",
    )
    formula = "sum_j w_ij v_j / sum_j w_ij,  w_ij = relu(q_i).relu(k_j) cos(pi (i - j) / (2 m))"
    needs = "training"
    Config = CosformerConfig

    @property
    def _span(self) -> int:
        assert isinstance(self.config, CosformerConfig)
        return self.config.span

    def bounded(self, site: AttentionSite) -> bool:
        """The cosines are those of a stated span."""
        return True

    def applies(self, site: AttentionSite) -> Verdict:
        """As the linear forms, up to `span` tokens."""
        longest = max(n for n in (site.dims.T, site.dims.S, 0) if isinstance(n, int))
        if longest > self._span:
            return no(
                Reason.LENGTH,
                f"{site.id} has {longest} tokens and cosformer weighs tokens {self._span} apart "
                f"with 0; set its option span to at least {longest}",
            )
        return super().applies(site)

    def width(self, site: AttentionSite) -> int:
        """2 D."""
        return 2 * site.dims.D

    def _table(self, tokens: int, first: int) -> np.ndarray[Any, Any]:
        """[tokens, 2]: sine and cosine of the positions from `first`."""
        angle = (first + np.arange(tokens)) * (math.pi / 2 / self._span)
        return np.stack([np.sin(angle), np.cos(angle)], 1)

    def features(self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor) -> Pair:
        """Positive parts times sine and cosine; FormError for more than `span` tokens."""
        queries, keys = q.shape[2], k.shape[2]
        if max(queries, keys) > self._span:
            raise FormError(
                f"cosformer got {max(queries, keys)} tokens; its option span is {self._span}"
            )
        first = keys - queries if spec.causal else 0
        return self._turn(q, first), self._turn(k, 0)

    def features_at(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        position: torch.Tensor,
    ) -> Pair:
        """The angles follow the position."""
        first = int(position[0, 0])
        if first + q.shape[2] > self._span:
            raise InputError(f"position: cosformer's span is {self._span} tokens")
        return self._turn(q, first), self._turn(k, first)

    def state(self, site: AttentionSite, length: int) -> tuple[StateSpec, ...]:
        """Sums of 2 D features; FormError for sequences longer than `span`."""
        if length > self._span:
            raise FormError(
                f"{site.id}: cosformer weighs tokens {self._span} apart with 0, and sequences are "
                f"to have {length}; give a max_length up to that, or a longer span"
            )
        return super().state(site, length)

    def _turn(self, x: torch.Tensor, first: int) -> torch.Tensor:
        positive = relu(x, FLOOR)
        table = torch.from_numpy(self._table(x.shape[2], first)).to(positive)
        return torch.cat([positive * table[:, :1], positive * table[:, 1:]], -1)

    def map_ops(self, site: AttentionSite) -> OpCount:
        """For each channel max, add (positive part) and two mul."""
        b, h, g, t, s, d, _ = sizes(site)
        total = OpCount()
        for rows, tokens in ((b * h * t, t), (b * g * s, s)):
            n = rows * d
            total += count(site, 2 * n, n + 2 * tokens, max=n, add=n, mul=2 * n)
        return total

    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> tuple[Any, Any]:
        """Two maps with tables of the positions."""
        queries, keys = kit.tokens(q), kit.tokens(k)
        first = keys - queries if spec.causal else 0
        return (
            kit.cosine(q, kit.constant(self._table(queries, first)), FLOOR),
            kit.cosine(k, kit.constant(self._table(keys, 0)), FLOOR),
        )

    def map_kernels_at(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any, position: Any
    ) -> tuple[Any, Any]:
        """The two maps with the rows of one table that the position names."""
        table = kit.rows_at(kit.constant(self._table(self._span, 0)), position)
        return kit.cosine(q, table, FLOOR), kit.cosine(k, table, FLOOR)
