"""Rule ``relative_blocks``: relative factors near a query, sums of features far from it, in tiles.

States of all blocks are summed in parallel and added up from either end for each head; tiles of
rows read both. A column of ones beside the values carries the denominator along, and hidden keys
have values of zero, so that nothing else need ask for them. Tables and visible keys are small:
a head, or a sample, at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.relative_blocks import TINY, BlockFacts, Sizes
from codegen.kernels.tiles import (
    ROWS,
    build,
    fill,
    imin,
    load,
    reduce_row,
    scratch,
    up,
    vectors,
)
from codegen.kernels.vector_math import f32
from codegen.rule import Rule
from codegen.schedules._near_far import NearFar
from codegen.target import Target

NAME = "relative_blocks"


class _Blocks(NearFar, Sizes):
    def __init__(self, facts: BlockFacts, lanes: int, args: Sequence[Any]) -> None:
        super().__init__(facts, args[:-1], args[-1])
        self.lanes, self.Ep, self.Rp = lanes, up(self.E + 1, lanes), up(self.R, ROWS)
        self.width = up(self.near, lanes)
        self.columns = self.T + self.width  # keys read beyond the last token have no values
        heads, batch = self.B * self.G, int(self.table.shape[0])
        self.values = scratch(heads, self.columns, self.Ep)
        self.turned = scratch(heads, self.R, self.columns)
        self.padded = scratch(batch, self.H, 2 * self.T - 1 + self.width)
        self.part = scratch(heads, self.blocks, self.Rp, self.Ep)
        self.far = scratch(self.B * self.H, self.blocks, self.Rp, self.Ep)

    def write(self) -> None:
        self.widen(self._visible)
        self.turn(self.fk, self.R)
        batch = int(self.table.shape[0])
        with T.grid(batch, self.H, 2 * self.T - 1 + self.width) as (b, h, t):
            T.buffer_store(self.padded, self.table[b, h, imin(t, 2 * self.T - 2)], [b, h, t])
        self.sums()
        with T.parallel(0, self.B * self.H * self.Rp) as n:
            self._add_up(n // self.Rp, n % self.Rp)
        self.read()

    def _visible(self, b: Any, j: Any) -> Any:
        inside = j < self.T
        if self.mask is None:
            return inside
        return tirx.all(inside, self.shown(b, imin(j, self.T - 1)))

    def _add_up(self, bh: Any, r: Any) -> None:
        """far of block n: the blocks up to n - 2, and (not causal) from n + 2 on."""
        b, h = bh // self.H, bh % self.H
        bg, run, last = b * self.G + h // self.group, scratch(1, self.Ep), self.blocks - 1
        ends = scratch(1, 2)
        for side in (0,) if self.causal else (0, 1):
            highest = reduce_row(
                self.T - 1 - self.C,
                self.lanes,
                lambda n, side=side: self.factor(b, h, self.distance(side, n)),  # type: ignore[misc]
                tirx.max,
                0.0,
            )
            T.buffer_store(ends, highest, [0, side])

        def earlier(n: Any) -> None:
            def one(e: Any) -> None:
                T.buffer_store(self.far, run[0, e] * ends[0, 0], [bh, n, r, e])

            vectors(self.Ep, self.lanes, one)

        def later(n: Any) -> None:
            def one(e: Any) -> None:
                both = self.far[bh, n, r, e] + run[0, e] * ends[0, 1]
                T.buffer_store(self.far, both, [bh, n, r, e])

            vectors(self.Ep, self.lanes, one)

        fill(run, 1, self.Ep)
        with T.serial(0, self.blocks) as n:
            with T.If(n > 1), T.Then():
                self.add_part(run, bg, n - 2, r)
            earlier(n)
        if self.causal:
            return
        fill(run, 1, self.Ep)
        with T.serial(0, self.blocks - 2) as back:
            self.add_part(run, bg, last - back, r)
            later(last - 2 - back)

    def read_tile(self, b: Any, h: Any, block: Any, part: Any) -> None:
        rows = min(ROWS, self.C)
        row, weights, features = part * rows, scratch(rows, self.width), scratch(rows, self.R)

        def token(i: Any) -> Any:
            return self.token(block, row + i)

        self.copy(rows, self.R, features, lambda i, r: load(self.fq, b, h, token(i), r))
        self._weights(b, h, block, token, features, weights)
        self.write_rows((b, h, block, row), b * self.H + h, weights, features, TINY)

    def _weights(self, b: Any, h: Any, block: Any, token: Any, features: Any, weights: Any) -> None:
        """Products of features with the keys near, times their factors."""
        end = (block + (1 if self.causal else 2)) * self.C  # of the keys near
        bt, first = 0 if int(self.table.shape[0]) == 1 else b, self.first_near(block)

        def put(i: Any, j: Any, s: Any) -> None:
            key = first + j
            factor = self.padded[bt, h, key - token(i) + (self.T - 1)]
            T.buffer_store(weights, s * tirx.Select(key < end, factor, f32(0.0)), [i, j])

        bg = b * self.G + h // self.group
        self.near_products(features, self.R, bg, first, put)


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of blocks made by the kit, None for anything else."""
    data = facts_of(func, NAME)
    if data is None:
        return None
    facts = BlockFacts.from_json(data)
    body = build(func, lambda *args: _Blocks(facts, target.lanes, args).write())
    return tvm.s_tir.Schedule(body)


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
