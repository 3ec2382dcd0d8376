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
    imax,
    imin,
    load,
    panels,
    reduce_row,
    scratch,
    store,
    tile,
    up,
    vectors,
)
from codegen.kernels.vector_math import f32
from codegen.rule import Rule
from codegen.target import Target

NAME = "relative_blocks"


class _Blocks(Sizes):
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
        heads, batch = self.B * self.G, int(self.table.shape[0])
        with T.parallel(0, heads * self.columns) as n:
            self._widen(n // self.columns, n % self.columns)
        with T.parallel(0, heads * self.R) as n, T.serial(0, self.columns) as j:
            bg, r = n // self.R, n % self.R
            value = load(self.fk, bg // self.G, bg % self.G, imin(j, self.T - 1), r)
            T.buffer_store(self.turned, value, [bg, r, j])
        with T.grid(batch, self.H, 2 * self.T - 1 + self.width) as (b, h, t):
            T.buffer_store(self.padded, self.table[b, h, imin(t, 2 * self.T - 2)], [b, h, t])
        with T.parallel(0, heads * self.blocks) as n:
            self._sum(n // self.blocks, n % self.blocks)
        with T.parallel(0, self.B * self.H * self.Rp) as n:
            self._add_up(n // self.Rp, n % self.Rp)
        tiles = -(-self.C // min(ROWS, self.C))
        with T.parallel(0, self.B * self.H * self.blocks * tiles) as n:
            bh, rest = n // (self.blocks * tiles), n % (self.blocks * tiles)
            self._read(bh // self.H, bh % self.H, rest // tiles, rest % tiles)

    def _widen(self, bg: Any, j: Any) -> None:
        """The values of a visible token, a one, zeros; all zero for any other."""
        zero = lambda e: T.buffer_store(self.values, f32(0.0), [bg, j, e])  # noqa: E731
        vectors(self.Ep, self.lanes, zero)
        shown = j < self.T
        if self.mask is not None:
            shown = tirx.all(shown, self.shown(bg // self.G, imin(j, self.T - 1)))

        def copy(e: Any) -> None:
            value = load(self.v, bg // self.G, bg % self.G, j, e)
            T.buffer_store(self.values, value, [bg, j, e])

        with T.If(shown), T.Then():
            vectors(self.E, self.lanes, copy)
            T.buffer_store(self.values, f32(1.0), [bg, j, self.E])

    def _sum(self, bg: Any, block: Any) -> None:
        """The state of one block of keys."""
        b, g, first = bg // self.G, bg % self.G, block * self.C
        number = imin(self.C, self.T - first) if self.T % self.C else self.C
        with T.serial(0, self.Rp // ROWS) as rows:
            r0 = rows * ROWS
            for e0, width in panels(self.Ep, self.lanes):
                tile(
                    # Features after the last repeat it; nothing reads their sums.
                    lambda i, j: load(self.fk, b, g, first + j, imin(r0 + i, self.R - 1)),
                    lambda j, e, e0=e0: self.values[bg, first + j, e0 + e],  # type: ignore[misc]
                    number,
                    lambda i, e, s, e0=e0: T.buffer_store(  # type: ignore[misc]
                        self.part, s, [bg, block, r0 + i, e0 + e]
                    ),
                    width=width,
                )

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

        def add(n: Any) -> None:
            def one(e: Any) -> None:
                T.buffer_store(run, run[0, e] + self.part[bg, n, r, e], [0, e])

            vectors(self.Ep, self.lanes, one)

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
                add(n - 2)
            earlier(n)
        if self.causal:
            return
        fill(run, 1, self.Ep)
        with T.serial(0, self.blocks - 2) as back:
            add(last - back)
            later(last - 2 - back)

    def _read(self, b: Any, h: Any, block: Any, part: Any) -> None:
        """A tile of rows of one block."""
        rows = min(ROWS, self.C)
        row, bg, bh = part * rows, b * self.G + h // self.group, b * self.H + h
        first = imax(block - 1, 0) * self.C  # of the keys near
        weights, result = scratch(rows, self.width), scratch(rows, self.Ep)
        features = scratch(rows, self.R)

        def token(i: Any) -> Any:
            return imin(block * self.C + imin(row + i, self.C - 1), self.T - 1)

        with T.serial(0, rows) as i:

            def copy(r: Any, i: Any = i) -> None:
                T.buffer_store(features, load(self.fq, b, h, token(i), r), [i, r])

            vectors(self.R, self.lanes, copy)
        self._weights(b, h, bg, block, first, token, features, weights)
        for e0, width in panels(self.Ep, self.lanes):
            near = (
                self.near,
                lambda i, j: weights[i, j],
                lambda j, e, e0=e0: self.values[bg, first + j, e0 + e],
            )
            far = (
                self.R,
                lambda i, r: features[i, r],
                lambda r, e, e0=e0: self.far[bh, block, r, e0 + e],
            )
            tile(
                near[1],
                near[2],
                [near, far],
                lambda i, e, s, e0=e0: T.buffer_store(result, s, [i, e0 + e]),  # type: ignore[misc]
                rows=rows,
                width=width,
            )
        with T.serial(0, rows) as i:
            inside = tirx.all(row + i < self.C, block * self.C + row + i < self.T)
            with T.If(inside), T.Then():
                self._divide(b, h, token(i), result, i)

    def _weights(
        self, b: Any, h: Any, bg: Any, block: Any, first: Any, token: Any, features: Any,
        weights: Any,
    ) -> None:  # fmt: skip
        """Products of features with the keys near, times their factors."""
        end = (block + (1 if self.causal else 2)) * self.C  # of the keys near
        bt = 0 if int(self.table.shape[0]) == 1 else b

        def put(i: Any, j: Any, s: Any) -> None:
            key = first + j
            factor = self.padded[bt, h, key - token(i) + (self.T - 1)]
            T.buffer_store(weights, s * tirx.Select(key < end, factor, f32(0.0)), [i, j])

        for j0, width in panels(self.near, self.lanes):
            tile(
                lambda i, r: features[i, r],
                lambda r, j, j0=j0: self.turned[bg, r, first + j0 + j],  # type: ignore[misc]
                self.R,
                lambda i, j, s, j0=j0: put(i, j0 + j, s),  # type: ignore[misc]
                rows=min(ROWS, self.C),
                width=width,
            )

    def _divide(self, b: Any, h: Any, at: Any, result: Any, i: Any) -> None:
        factor = scratch(1, 1)
        T.buffer_store(factor, f32(1.0) / tirx.max(result[i, self.E], f32(TINY)), [0, 0])

        def put(e: Any) -> None:
            store(self.out, [b, h, at, e], result[i, e] * factor[0, 0])

        vectors(self.E, self.lanes, put)


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of blocks made by the kit, None for anything else."""
    data = facts_of(func, NAME)
    if data is None:
        return None
    facts = BlockFacts.from_json(data)
    body = build(func, lambda *args: _Blocks(facts, target.lanes, args).write())
    return tvm.s_tir.Schedule(body)


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
