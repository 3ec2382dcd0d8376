"""Layer norm and RMS norm: several rows at a time, their sums folded over the lanes together."""

from __future__ import annotations

import math
from typing import Any

import tvm.s_tir
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.folds import power_of_two
from codegen.kernels.tiles import build, imin
from codegen.rule import Rule
from codegen.schedules._common import SMALL, threads
from codegen.schedules._norm import GROUP, RowNorm
from codegen.target import Target

NAME = "layer_norm"
# Bytes of the rows of one tile, which are read three times.
_CACHED = 32 * 1024


class _Norm:
    """One kernel while it is written: x and out [..., N], gamma [N] and beta [N] or none."""

    def __init__(self, facts: dict[str, Any], target: Target, args: list[Any]) -> None:
        x, gamma, *beta, self.out = args
        *self.lead, width = (int(n) for n in x.shape)
        self.rows = math.prod(self.lead)
        self.workers = threads(target) if self.rows * width >= SMALL else 1
        self.height = _height(self.rows, width, target.lanes, self.workers)
        self.norm = RowNorm(
            x,
            gamma,
            beta[0] if beta else None,
            centred=bool(facts["centred"]),
            eps=float(facts["eps"]),
            lanes=target.lanes,
            height=self.height,
        )

    def write(self) -> None:
        """Emit all rows."""
        tiles = -(-self.rows // self.height)
        loop = T.parallel if self.workers > 1 and tiles > 1 else T.serial
        with loop(0, tiles) as t:
            first = t * self.height

            def store(r: int, j: Any, value: Any) -> None:
                T.buffer_store(self.out, value, [*self._row(first, r), j])

            self.norm.tile(lambda r: self._row(first, r), store)

    def _row(self, first: Any, r: int) -> list[Any]:
        """Index of a row; rows after the last one are that one again, with the same result."""
        n = first + r
        if self.rows % self.height:
            n = imin(n, self.rows - 1)
        index: list[Any] = []
        for size in reversed(self.lead):
            index.insert(0, n % size)
            n = n // size
        return index


def _height(rows: int, width: int, lanes: int, workers: int) -> int:
    """Rows of a tile, a power of two up to `lanes`: little work of the busiest thread."""
    most = min(lanes, power_of_two(rows), max(_CACHED // (4 * width), 1))
    heights = [h for h in (1 << n for n in range(lanes.bit_length())) if h <= most]

    def cost(height: int) -> int:
        tiles = -(-rows // height)
        return -(-tiles // workers) * (height + GROUP)

    return min(reversed(heights), key=cost)


def apply(func: Any, target: Target) -> Any | None:
    """The kernel of a norm along the last axis, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    return tvm.s_tir.Schedule(build(func, lambda *args: _Norm(facts, target, list(args)).write()))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=30)
