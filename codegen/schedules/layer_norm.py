"""Layer norm and RMS norm: several rows at a time, their sums folded over the lanes together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.folds import all_lanes, power_of_two, put, sums, whole
from codegen.kernels.tiles import build, imin, scratch, vectors
from codegen.rule import Rule
from codegen.schedules._common import SMALL, threads
from codegen.target import Target

NAME = "layer_norm"
# Rows whose sums are taken side by side: enough to hide the latency of an addition.
_GROUP = 4
# Bytes of the rows of one tile, which are read three times.
_CACHED = 32 * 1024


class _Norm:
    """One kernel while it is written: x and out [..., N], gamma [N] and beta [N] or none."""

    def __init__(self, facts: dict[str, Any], target: Target, args: list[Any]) -> None:
        self.x, self.gamma, *beta, self.out = args
        self.beta = beta[0] if beta else None
        self.centred, self.eps = bool(facts["centred"]), float(facts["eps"])
        *self.lead, self.width = (int(n) for n in self.x.shape)
        self.rows, self.lanes = math.prod(self.lead), target.lanes
        self.workers = threads(target) if self.rows * self.width >= SMALL else 1
        self.height = _height(self.rows, self.width, self.lanes, self.workers)

    def write(self) -> None:
        """Emit all rows."""
        tiles = -(-self.rows // self.height)
        loop = T.parallel if self.workers > 1 and tiles > 1 else T.serial
        with loop(0, tiles) as t:
            self._tile(t * self.height)

    def _tile(self, first: Any) -> None:
        mean, inverse = scratch(self.height), scratch(self.height)
        scale = all_lanes(1.0 / self.width, self.height)
        if self.centred:
            self._put(mean, self._sums(first, lambda r, value: value) * scale)

        def square(r: int, value: Any) -> Any:
            value = self._minus(value, mean, r)
            return value * value

        variance = self._sums(first, square) * scale + all_lanes(self.eps, self.height)
        self._put(inverse, all_lanes(1.0, self.height) / tirx.sqrt(variance))
        for group in self._groups():
            rows = [self._row(first, r) for r in group]

            def one(j: Any, group: range = group, rows: list[Any] = rows) -> None:
                for r, row in zip(group, rows, strict=True):
                    value = self._minus(self.x[(*row, j)], mean, r) * inverse[r]
                    T.buffer_store(self.out, self._affine(value, j), [*row, j])

            vectors(self.width, self.lanes, one)

    def _groups(self) -> list[range]:
        step = min(_GROUP, self.height)
        return [range(r, r + step) for r in range(0, self.height, step)]

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

    def _minus(self, value: Any, mean: Any, r: int) -> Any:
        return value - mean[r] if self.centred else value

    def _affine(self, value: Any, j: Any) -> Any:
        value = value * self.gamma[j]
        return value if self.beta is None else value + self.beta[j]

    def _put(self, buffer: Any, value: Any) -> None:
        put(buffer, value, lanes=self.height)

    def _sums(self, first: Any, value: Callable[[int, Any], Any]) -> Any:
        """The sums over each row r of value(r, x[r, j]), as one vector."""
        parts = []
        for group in self._groups():
            rows, held = [self._row(first, r) for r in group], [scratch(self.lanes) for _ in group]
            for part in held:
                put(part, all_lanes(0.0, self.lanes), lanes=self.lanes)

            def add(
                j: Any, lane: Any, rows: Any = rows, held: Any = held, r0: int = group[0]
            ) -> None:
                for n, (row, part) in enumerate(zip(rows, held, strict=True)):
                    found = part[lane] + value(r0 + n, self.x[(*row, j)])
                    T.buffer_store(part, found, [lane])

            blocks, rest = divmod(self.width, self.lanes)
            with T.serial(0, blocks) as k, T.vectorized(0, self.lanes) as lane:
                add(k * self.lanes + lane, lane)
            if rest:
                with T.serial(0, rest) as lane:
                    add(blocks * self.lanes + lane, lane)
            parts += [whole(part, lanes=self.lanes) for part in held]
        return sums(parts, self.lanes)


def _height(rows: int, width: int, lanes: int, workers: int) -> int:
    """Rows of a tile, a power of two up to `lanes`: little work of the busiest thread."""
    most = min(lanes, power_of_two(rows), max(_CACHED // (4 * width), 1))
    heights = [h for h in (1 << n for n in range(lanes.bit_length())) if h <= most]

    def cost(height: int) -> int:
        tiles = -(-rows // height)
        return -(-tiles // workers) * (height + _GROUP)

    return min(reversed(heights), key=cost)


def apply(func: Any, target: Target) -> Any | None:
    """The kernel of a norm along the last axis, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    return tvm.s_tir.Schedule(build(func, lambda *args: _Norm(facts, target, list(args)).write()))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=30)
