"""What the fused linear attentions share: sizes, blocks of keys, reading a state."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.folds import all_lanes, power_of_two, put, row_sums, whole
from codegen.kernels.fused_linear import FusedFacts
from codegen.kernels.tiles import (
    ROWS,
    imin,
    load,
    panels,
    scratch,
    store,
    tile,
    up,
    vectors,
)
from codegen.kernels.vector_math import f32
from codegen.schedules._common import threads
from codegen.schedules._features import AHEAD, Elu, Pair, Rows
from codegen.schedules._fetch import fetch_row
from codegen.target import Target

KEYS = 64  # of one block
QUERIES = 64


class Shared:
    """Sizes, buffers and helpers of either kernel while it is written."""

    size: int  # tokens of a block of keys
    state: Any  # [heads, entries, F, Ep]
    norm: Any  # [heads, entries, F]

    def __init__(self, facts: FusedFacts, target: Target, args: list[Any], out: Any) -> None:
        self.facts, self.target, self.lanes = facts, target, target.lanes
        # Two vectors a row are accumulated in registers, beside operands.
        self.height = ROWS if target.vector_registers >= 4 * ROWS else ROWS // 2
        self.q, self.k, self.v, *rest = args
        (w_q, w_k), self.mask = facts.split(rest)
        self.out = out
        self.fq, self.fk = (
            _rows(facts, x, w, s, self.lanes, self.height)
            for x, w, s in zip((self.q, self.k), (w_q, w_k), facts.scales, strict=True)
        )
        self.B, self.H, self.T, _ = (int(n) for n in self.q.shape)
        self.G, self.S, self.E = (
            int(self.k.shape[1]), int(self.k.shape[2]), int(self.v.shape[3]),
        )  # fmt: skip
        self.group, self.Ep = self.H // self.G, up(self.E, self.lanes)
        self.F = self.fk.width
        self.stride = self.F + self.lanes  # rows of features do not share cache sets
        self.workers = threads(target)
        self.columns = panels(self.E, self.lanes)

    def shown(self, b: Any, end: Any) -> Any:
        """Function of a token: whether it is a key that counts; None if all are.

        `end` is the first token that is none, or None if no task gets that far.
        """
        tests: list[Any] = [] if end is None else [lambda j: j < end]
        if self.mask is not None:
            row = 0 if int(self.mask.shape[0]) == 1 else b
            tests.append(lambda j: self.mask[row, j if end is None else imin(j, self.S - 1)])
        return (lambda j: tirx.all(*(t(j) for t in tests))) if tests else None

    def load_values(self, b: Any, g: Any, first: Any, number: Any, into: Any, seen: Any) -> None:
        """Values of a block of keys; zero where no key counts, and in padding."""
        with T.serial(0, number) as i:
            j = first + i

            def put(e: Any) -> None:
                value = load(self.v, b, g, j if seen is None else imin(j, self.S - 1), e)
                if seen is not None:
                    value = tirx.Select(seen(j), value, f32(0.0))
                T.buffer_store(into, value, [i, e])

            fetch_row(self.v, b, g, imin(j + AHEAD, self.S - 1))
            vectors(self.E, self.lanes, put)
            if self.Ep > self.E:
                with T.serial(self.E, self.Ep) as e:
                    T.buffer_store(into, f32(0.0), [i, e])

    def absorb(self, keys: Any, values: Any, number: Any, state: Any, norm: Any) -> None:
        """state(r, e) += keys^T values and norm(r) += the sums of keys, over `number` rows."""
        with T.serial(0, self.F // self.height) as block:
            r0 = block * self.height
            for e0, width in self.columns:
                tile(
                    lambda i, j: keys[j, r0 + i],
                    lambda j, e, e0=e0: values[j, e0 + e],  # type: ignore[misc]
                    number,
                    lambda i, e, s, e0=e0: state.put(s, r0 + i, e0 + e),  # type: ignore[misc]
                    rows=self.height,
                    width=width,
                    start=lambda i, e, e0=e0: state(r0 + i, e0 + e),  # type: ignore[misc]
                )
        most = max(n for n in range(1, 9) if self.F // self.lanes % n == 0)
        with T.serial(0, self.F // self.lanes // most) as block:
            acc = scratch(most, self.lanes)

            def at(i: Any, x: Any) -> Any:
                return (block * most + i) * self.lanes + x

            with T.unroll(0, most) as i, T.vectorized(0, self.lanes) as x:
                T.buffer_store(acc, norm(at(i, x)), [i, x])
            with T.serial(0, number) as j, T.unroll(0, most) as i, T.vectorized(0, self.lanes) as x:
                T.buffer_store(acc, acc[i, x] + keys[j, at(i, x)], [i, x])
            with T.unroll(0, most) as i, T.vectorized(0, self.lanes) as x:
                norm.put(acc[i, x], at(i, x))

    def bottoms(self, queries: Any, rows: int, norm: Any, into: Any, at: Any, near: Any) -> None:
        """into[at, i] = 1 / max(queries(i) . norm + the lanes of near(i), eps), for one tile.

        `near(i, x)`: lane x of what else a row adds; None for nothing.
        """
        lanes = self.lanes
        acc = scratch(rows, lanes)
        with T.unroll(0, rows) as i, T.vectorized(0, lanes) as x:
            T.buffer_store(acc, f32(0.0) if near is None else near(i, x), [i, x])
        with T.serial(0, self.F // lanes) as o, T.unroll(0, rows) as i, T.vectorized(0, lanes) as x:
            r = o * lanes + x
            T.buffer_store(acc, acc[i, x] + queries(i, r) * norm(r), [i, x])
        row_sums(acc, rows, lanes, into, at)
        number = power_of_two(rows)
        step = min(number, lanes)
        # One division for a row; the definition divides each element, equal within rounding.
        for n in range(0, number, step):
            value, eps = whole(into, at, lanes=step, start=n), all_lanes(self.facts.eps, step)
            value = tirx.Select(value < eps, eps, value)  # keeps NaN
            put(into, all_lanes(1.0, step) / value, at, lanes=step, start=n)

    def sum_keys(self, bg: Any, entry: Any, first: Any, last: Any, ragged: bool) -> None:
        """state[bg, entry], norm[bg, entry] = the sums over keys first <= j < last.

        `ragged`: the number of keys need not be a multiple of the block.
        """
        b, g, size, rows = bg // self.G, bg % self.G, self.size, self.fk.rows
        state, norm = Part(self.state, bg, entry), Part(self.norm, bg, entry)
        with T.serial(0, self.F) as r:
            vectors(self.Ep, self.lanes, lambda e: state.put(f32(0.0), r, e))
        vectors(self.F, self.lanes, lambda r: norm.put(f32(0.0), r))
        keys, values = scratch(size, self.stride), scratch(size, self.Ep)
        seen = self.shown(b, last if ragged else None)
        with T.serial(0, (last - first + size - 1) // size) as block:
            start = first + block * size
            tiles: Any = size // rows
            if ragged:
                tiles = imin(tiles, (last - start + rows - 1) // rows)
            self.fk.block(b, g, start, tiles, keys, seen)
            self.load_values(b, g, start, tiles * rows, values, seen)
            self.absorb(keys, values, tiles * rows, state, norm)

    def write_rows(self, b: Any, h: Any, first: Any, rows: Any, e0: int, width: int) -> None:
        """Write a tile of outputs, without what is beyond the last query or channel."""
        count = int(rows.shape[0])
        number = min(width, self.E - e0)

        def row(i: Any) -> None:
            at = [b, h, first + i]
            vectors(number, self.lanes, lambda e: store(self.out, [*at, e0 + e], rows[i, e]))

        if self.fq.ragged:
            with T.serial(0, count) as i, T.If(first + i < self.T), T.Then():
                row(i)
        else:
            with T.unroll(0, count) as i:
                row(i)


class Part:
    """A part of a buffer: leading indices are fixed."""

    def __init__(self, buffer: Any, *lead: Any) -> None:
        self.buffer, self.lead = buffer, lead

    def __call__(self, *at: Any) -> Any:
        return self.buffer[(*self.lead, *at)]

    def put(self, value: Any, *at: Any) -> None:
        """Store."""
        T.buffer_store(self.buffer, value, [*self.lead, *at])


def _rows(facts: FusedFacts, x: Any, w: Any, scale: float, lanes: int, height: int) -> Rows:
    if facts.map == "elu1":
        return Elu(x, lanes, height)
    return Pair(x, w, scale, lanes, height)
