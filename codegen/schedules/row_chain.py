"""Chains of row-wise operators (codegen/kernels/row_chain.py), a block of rows at a time.

What lies between the operators of a block stays in the second-level cache; the weights pass by
once a block. Inside a block a panel of weights is used for all of its rows before the next one is
read. Where rows are no multiple of a tile, the last tile starts earlier: rows that are done twice
get the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.s_tir
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.row_chain import NAME, ChainFacts, Layer, Tensors, behind
from codegen.kernels.tiles import ROWS, build, imin, scratch
from codegen.kernels.vector_math import f32
from codegen.rule import Rule
from codegen.schedules._common import threads
from codegen.schedules._norm import RowNorm
from codegen.target import Target

_SHARE = 2  # what lies between the operators of a block takes this part of the second-level cache
_NORM_ROWS = 4
_HIGHEST = 12  # rows of a register tile: 24 sums of 32 registers


class _Rows:
    """Some columns of rows from `base` on, in a buffer whose first row is row `base`."""

    def __init__(self, buffer: Any, base: Any) -> None:
        self.buffer, self.base = buffer, base

    def __call__(self, row: Any, column: Any) -> Any:
        return self.buffer[row - self.base, column]

    def put(self, row: Any, column: Any, value: Any) -> None:
        """Store."""
        T.buffer_store(self.buffer, value, [row - self.base, column])


class _Chain:
    """One kernel while it is written."""

    def __init__(self, facts: ChainFacts, target: Target, args: list[Any]) -> None:
        self.target = target
        self.x, *rest, self.out = args
        self.layers = list(zip(facts.layers, facts.split(rest), strict=True))
        self.rows = int(self.x.shape[0])
        self.height = min(_height(self.rows, target), self.rows)
        self.tiles = -(-self.rows // self.height)
        between = sum(_columns(t) for _, t in self.layers[:-1])
        between += sum(int(t.panels.shape[1]) for layer, t in self.layers if layer.norm)
        self.blocks = _blocks(self.tiles, 4 * self.height * max(between, 1), target)
        self.most = -(-self.tiles // self.blocks) * self.height  # rows of a block

    def write(self) -> None:
        """Emit all blocks."""
        with T.parallel(0, self.blocks) as block:
            first = block * self.tiles // self.blocks
            number = (block + 1) * self.tiles // self.blocks - first
            self._block(first, number)

    def _block(self, first: Any, number: Any) -> None:
        base = first * self.height
        x = normed = _Rows(self.x, 0)
        for layer, tensors in self.layers:
            if layer.norm:
                normed, x = x, self._norm(layer, tensors, x, base, number)
            if tensors is self.layers[-1][1]:
                into = _Rows(self.out, 0)
            else:
                into = _Rows(scratch(self.most, _columns(tensors)), base)
            added = normed if layer.add == "normed" else None
            if layer.add == "given":
                added = _Rows(tensors.added, 0)
            with T.serial(0, int(tensors.panels.shape[0])) as p, T.serial(0, number) as t:
                row = (first + t) * self.height
                if self.rows % self.height:
                    row = imin(row, self.rows - self.height)
                self._tile(layer, tensors, x, added, into, (row, p))
            x = into

    def _norm(self, layer: Layer, tensors: Tensors, x: _Rows, base: Any, number: Any) -> _Rows:
        """The normed rows of a block."""
        depth = int(tensors.panels.shape[1])
        held = _Rows(scratch(self.most, depth), base)
        norm = RowNorm(
            x.buffer,
            tensors.gamma,
            tensors.beta,
            centred=layer.norm == "layer_norm",
            eps=layer.eps,
            lanes=self.target.lanes,
            height=1 << min(_NORM_ROWS, self.target.lanes, self.rows).bit_length() - 1,
        )
        count = imin(number * self.height, self.rows - base)
        with T.serial(0, (count + norm.height - 1) // norm.height) as turn:
            row = base + imin(turn * norm.height, count - norm.height)
            norm.tile(lambda r: [row + r - x.base], lambda r, j, value: held.put(row + r, j, value))
        return held

    def _tile(
        self,
        layer: Layer,
        tensors: Tensors,
        x: _Rows,
        added: Callable[[Any, Any], Any] | None,
        into: _Rows,
        at: tuple[Any, Any],
    ) -> None:
        """One register tile of a product and what follows it; `at`: first row, panel."""
        (row, p), (_, depth, width) = at, (int(n) for n in tensors.panels.shape)

        def put(i: Any, j: Any, value: Any) -> None:
            column = p * width + j
            value = behind(value, (row + i, column), layer, tensors.bias, added)
            into.put(row + i, column, value)

        # A buffer for each row: TVM keeps more than a kilobyte in no register.
        sums = [scratch(width) for _ in range(self.height)]
        for held in sums:
            with T.vectorized(0, width) as j:
                T.buffer_store(held, f32(0.0), [j])
        with T.serial(0, depth) as k:
            for i, held in enumerate(sums):
                with T.vectorized(0, width) as j:
                    total = held[j] + x(row + i, k) * tensors.panels[p, k, j]
                    T.buffer_store(held, total, [j])
        for i, held in enumerate(sums):
            with T.vectorized(0, width) as j:
                put(i, j, held[j])


def _height(rows: int, target: Target) -> int:
    """Rows of a register tile: as many as leave the busiest thread least to do."""
    if target.vector_registers < 32:
        return 6
    workers = threads(target)

    def cost(height: int) -> float:
        tiles = -(-rows // height)
        return -(-tiles // workers) * height * (1.0 if height == ROWS else 1.01)

    return min(range(ROWS, _HIGHEST + 1), key=cost)


def _columns(tensors: Tensors) -> int:
    """Columns of a layer's result."""
    return int(tensors.panels.shape[0]) * int(tensors.panels.shape[2])


def _blocks(tiles: int, tile_bytes: int, target: Target) -> int:
    """Blocks of rows that fit the cache, as many for every thread, of two tiles or more."""
    most, workers = max(target.l2_bytes // _SHARE // tile_bytes, 2), threads(target)
    even = -(-tiles // most // workers) * workers
    return max(min(even, tiles // 2), 1)


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a chain, None for anything else."""
    data = facts_of(func, NAME)
    if data is None:
        return None
    facts = ChainFacts.from_json(data)
    return tvm.s_tir.Schedule(build(func, lambda *args: _Chain(facts, target, list(args)).write()))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
