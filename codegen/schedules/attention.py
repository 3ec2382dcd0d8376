"""Rule ``attention``: fused softmax attention, blocked for both caches, with online softmax.

K and V are packed once into panels of two vectors. A task takes some row tiles (eight queries
each) of one head through the blocks of keys: a block's scores panel by panel in registers (a
panel of K stays in the first-level cache for all row tiles), exponentials against the running
maximum, and the block's part of the output on top of the rescaled output so far (a block of V
stays in that cache too). Where no bias is added, a bound in place of the maxima is tried first
(`_bounded_softmax`). Key panels that no query of a tile can see are skipped. Causal tasks are
dealt out small with large, because TVM's threads take equal contiguous shares of the tasks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM, TINY, AttentionFacts, broadcast, facts_of, wide
from codegen.kernels.tiles import (
    ROWS,
    fill,
    fold,
    imax,
    imin,
    load,
    panels,
    reduce_row,
    scratch,
    store,
    sums,
    tile,
    up,
    vectors,
)
from codegen.kernels.vector_math import at_least, f32, vexp2_weight, vexp_weight
from codegen.rule import Rule
from codegen.schedules._bounded_softmax import Bounded
from codegen.schedules._common import threads
from codegen.schedules._softmax_kernel import written
from codegen.schedules._tasks import block_panels, most_tiles, tiles_per_task
from codegen.target import Target

NAME = "attention"
_LOG2E = 1.4426950408889634


@dataclass
class _Block:
    """One block of keys: panels first <= p < last, seen by row tiles up to `ends(tile)`."""

    first: Any
    last: Any


@dataclass
class _Kernel:
    """Sizes, buffers and helpers of one kernel while it is written."""

    facts: AttentionFacts
    target: Target
    q: Any
    k: Any
    v: Any
    key_mask: Any
    bias: Any
    out: Any
    limit: Any = field(default=None, init=False)
    first_try: Bounded | None = field(default=None, init=False)
    bounded = True  # whether a bound in place of the maxima is tried first (if no bias is added)

    def __post_init__(self) -> None:
        self.lanes = self.target.lanes
        self.B, self.H, self.T, self.D = (int(n) for n in self.q.shape)
        self.G, self.S = int(self.k.shape[1]), int(self.k.shape[2])
        self.E, self.group = int(self.v.shape[3]), self.H // int(self.k.shape[1])
        self.offset, self.rows = self.S - self.T, min(ROWS, self.T)
        self.width = 2 * self.lanes
        self.panels = up(self.S, self.width) // self.width
        self.ragged = self.S % self.width != 0
        self.tiles = -(-self.T // self.rows)
        self.block = block_panels(self.panels, self.width, self.target.l1_bytes)
        heads, workers = self.B * self.H, threads(self.target)
        most = most_tiles(self.target, windowed=self.facts.window is not None)
        self.share = tiles_per_task(heads, self.tiles, workers, most)
        self.columns = panels(self.E, self.lanes)
        self.bounded = self.bounded and self.facts.bias != "add"
        # In base 2, but for a bias that is added: the lowest float must not become -inf.
        self.scale = self.facts.scale * (_LOG2E if self.bounded else 1.0)
        self.power = vexp2_weight if self.bounded else vexp_weight
        # Whether each row tile has an own last panel of keys.
        self.ahead = min(
            ([0] if self.facts.causal else [])
            + ([self.facts.window[1]] if self.facts.window else []),
            default=None,
        )

    def write(self) -> None:
        """Emit the whole kernel."""
        self._pack()
        tasks = -(-self.tiles // self.share)
        with T.parallel(0, self.B * self.H * tasks) as task:
            bh, turn = task // tasks, task % tasks
            if self.facts.causal:
                turn = tirx.Select(turn % 2 == 0, turn // 2, tasks - 1 - turn // 2)
            self._task(bh // self.H, bh % self.H, turn * self.share)

    def _pack(self) -> None:
        """K panels [B G, S/width, D, width], V panels [B G, E/width, S, width], what is hidden."""
        heads = self.B * self.G
        self.kp = scratch(heads, self.panels, self.D, self.width)
        if self.bounded:
            self.first_try = Bounded(self)
        self.vp = scratch(heads, len(self.columns), self.panels * self.width, self.width)
        with T.parallel(0, heads * self.panels) as n:
            bg, p = n // self.panels, n % self.panels
            b, g = bg // self.G, bg % self.G
            with T.serial(0, self.width) as x:
                j = imin(p * self.width + x, self.S - 1)  # the last again, hidden later
                with T.serial(0, self.D) as d:
                    T.buffer_store(self.kp, load(self.k, b, g, j, d), [bg, p, d, x])
                for at, (e0, _) in enumerate(self.columns):

                    def put(e: Any, at: int = at, e0: int = e0, x: Any = x, j: Any = j) -> None:
                        value = load(self.v, b, g, j, e0 + e)
                        T.buffer_store(self.vp, value, [bg, at, p * self.width + x, e])

                    whole = min(self.width, self.E - e0)
                    vectors(whole, self.lanes, put)
                    # Channels after the last are read in whole vectors and dropped.
                    if whole % self.lanes:
                        with T.serial(0, up(whole, self.lanes) - whole) as e:
                            at_e = [bg, at, p * self.width + x, whole + e]
                            T.buffer_store(self.vp, f32(0.0), at_e)
            if self.first_try is not None:
                self.first_try.measure(bg, p)
        if self.key_mask is not None or self.ragged:
            self._limits()

    def _limits(self) -> None:
        """An upper limit for the scores of each key: -inf where it is hidden, else +inf."""
        batch = 1 if self.key_mask is None else int(self.key_mask.shape[0])
        padded = self.panels * self.width
        self.limit = scratch(batch, padded)
        with T.serial(0, batch) as b, T.serial(0, padded) as j:
            seen = j < self.S
            if self.key_mask is not None:
                seen = tirx.all(seen, self.key_mask[b, imin(j, self.S - 1)])
            high, low = f32(float("inf")), f32(float("-inf"))
            T.buffer_store(self.limit, tirx.Select(seen, high, low), [b, j])

    def _end(self, row: Any) -> Any:
        """One past the last key panel that a tile starting at query `row` can see."""
        if self.ahead is None:
            return self.panels
        keys = imax(imin(row + self.offset + self.rows + self.ahead, self.S), 0)
        return (keys + self.width - 1) // self.width

    def _start(self, row: Any) -> Any:
        """The first key panel that queries from `row` on can see."""
        if self.facts.window is None:
            return 0
        return imin(imax(row + self.offset - self.facts.window[0], 0), self.S) // self.width

    def _task(self, b: Any, h: Any, first_tile: Any) -> None:
        row = first_tile * self.rows
        number: Any = self.share
        if self.tiles % self.share:
            number = imin(self.share, self.tiles - first_tile)
        self._rows(b, h, row, number * self.rows)
        self._zero(number)
        if self.first_try is None:
            self._with_maxima(b, h, row, number)
        else:
            self.first_try.begin(b * self.G + h // self.group, number * self.rows)
            self._blocks(b, h, row, number, self._bounded_keys(self.first_try))
            self.first_try.end(number)
            with T.If(self.first_try.failed()), T.Then():
                self._zero(number)
                self._with_maxima(b, h, row, number)
        self._finish(b, h, row, number)

    def _rows(self, b: Any, h: Any, row: Any, count: Any) -> None:
        """Scratch of a task, and its `count` queries from `row` on."""
        most = self.share * self.rows
        self._queries(b, h, row, count, most)
        self.top, self.sum = scratch(most, 1), scratch(most, 1)
        self.fade = scratch(most, 1)
        self.ot = scratch(most, up(self.E, self.lanes))

    def _queries(self, b: Any, h: Any, row: Any, count: Any, most: int) -> None:
        """Scaled queries, and room for their scores; `most` rows at most."""
        self.qs, self.sc = scratch(most, self.D), scratch(most, self.block * self.width)
        with T.serial(0, count) as i:
            # Rows after the last repeat it and are not written back.
            def put(d: Any, i: Any = i) -> None:
                x = load(self.q, b, h, imin(row + i, self.T - 1), d)
                T.buffer_store(self.qs, x * f32(self.scale), [i, d])

            vectors(self.D, self.lanes, put)

    def _zero(self, number: Any) -> None:
        with T.serial(0, number * self.rows) as i:
            zero = lambda e, i=i: T.buffer_store(self.ot, f32(0.0), [i, e])  # noqa: E731
            vectors(up(self.E, self.lanes), self.lanes, zero)

    def _with_maxima(self, b: Any, h: Any, row: Any, number: Any) -> None:
        with T.serial(0, number * self.rows) as i:
            T.buffer_store(self.top, f32(MINIMUM), [i, 0])
            T.buffer_store(self.sum, f32(0.0), [i, 0])
        self._blocks(b, h, row, number, self._keys)

    def _blocks(self, b: Any, h: Any, row: Any, number: Any, take: Any) -> None:
        """take(b, h, row, number, block) for each block of keys that a query of the task sees."""
        begin, end = self._start(row), self._end(row + (number - 1) * self.rows)
        if self.block == self.panels:
            take(b, h, row, number, _Block(begin, end))
            return
        base = begin // self.block
        with T.serial(0, imax((end + self.block - 1) // self.block - base, 0)) as turn:
            low = (base + turn) * self.block
            high = low + self.block
            if self.ahead is not None or self.panels % self.block:
                high = imin(high, end)
            if self.facts.window is not None:
                low = imax(low, begin)
            take(b, h, row, number, _Block(low, high))

    def _bounded_keys(self, bounded: Bounded) -> Any:
        def take(b: Any, h: Any, row: Any, number: Any, block: _Block) -> None:
            bounded.scores(b, h, row, number, block)
            self._values(b, h, row, number, block, fading=False)

        return take

    def _keys(self, b: Any, h: Any, row: Any, number: Any, block: _Block) -> None:
        """Take the rows of a task through one block of keys."""
        self._scores(b, h, row, number, block)
        with T.serial(0, number) as t, T.serial(0, self.rows) as i:
            self._softmax(t * self.rows + i, self.seen_by(row, t, block), block)
        self._values(b, h, row, number, block, fading=True)

    def seen_by(self, row: Any, t: Any, block: _Block) -> Any:
        """How many panels of the block row tile t sees."""
        if self.ahead is None:
            return block.last - block.first
        return imax(imin(self._end(row + t * self.rows), block.last) - block.first, 0)

    def _scores(self, b: Any, h: Any, row: Any, number: Any, block: _Block) -> None:
        def take(acc: Any, r0: Any, turn: Any) -> None:
            for i, (n, column) in itertools.product(range(self.rows), enumerate(acc)):
                with T.vectorized(0, self.lanes) as x:
                    at = [r0 + i, turn * self.width + n * self.lanes + x]
                    T.buffer_store(self.sc, column[i, x], at)

        self.each_tile(b, h, row, number, block, take)

    def each_tile(
        self, b: Any, h: Any, row: Any, number: Any, block: _Block, take: Any, start: Any = None
    ) -> None:
        """take(acc, r0, turn): masked scores of a row tile (from r0) with a panel of the block,
        on top of start(row); `acc` as `tiles.sums` gives it."""
        bg = b * self.G + h // self.group
        with T.serial(0, block.last - block.first) as turn, T.serial(0, number) as t:
            p, r0 = block.first + turn, t * self.rows

            def emit(p: Any = p, r0: Any = r0, turn: Any = turn) -> None:
                acc = self.products(bg, p, r0, None if start is None else lambda i: start(r0 + i))
                if self.facts.hides or self.bias is not None or self.limit is not None:
                    for i, (n, column) in itertools.product(range(self.rows), enumerate(acc)):
                        with T.vectorized(0, self.lanes) as x:
                            j = p * self.width + n * self.lanes + x
                            s = self.masked(b, h, row + r0 + i, j, column[i, x])
                            T.buffer_store(column, s, [i, x])
                take(acc, r0, turn)

            if self.ahead is None:
                emit()
            else:
                with T.If(turn < self.seen_by(row, t, block)), T.Then():
                    emit()

    def products(self, bg: Any, p: Any, r0: Any, start: Any) -> list[Any]:
        """start(i) + the scores of queries r0 + i of the task with key panel p."""
        return sums(
            [(self.D, lambda i, d: self.qs[r0 + i, d], lambda d, x: self.kp[bg, p, d, x])],
            rows=self.rows,
            width=self.width,
            lanes=self.lanes,
            start=None if start is None else lambda i, x: start(i),
        )

    def masked(self, b: Any, h: Any, i: Any, j: Any, score: Any) -> Any:
        facts, masks = self.facts, []
        if self.bias is not None:
            at = (b, h, imin(i, self.T - 1), imin(j, self.S - 1) if self.ragged else j)
            value = broadcast(self.bias, at)
            if facts.bias == "hide":
                masks.append(value)
            else:
                score = score + wide(value, str(self.bias.dtype))
        if self.limit is not None:
            most = broadcast(self.limit, (b, j))
            score = tirx.Select(most < score, most, score)
        seen = facts.seen(i, j, self.offset, masks)
        return score if seen is None else tirx.Select(seen, score, f32(float("-inf")))

    def _softmax(self, row: Any, number: Any, block: _Block) -> None:
        """Exponentials in place of one row's scores, its maximum and sum, how far old ones fade."""
        width = self.width
        new, acc = scratch(1, 1), scratch(1, width)
        steps = number * width if isinstance(number, int) else number
        peak = reduce_row(steps, width, lambda j: self.sc[row, j], tirx.max, MINIMUM)
        T.buffer_store(new, tirx.max(peak, self.top[row, 0]), [0, 0])
        fill(acc, 1, width)
        with T.serial(0, number) as o:
            with T.vectorized(0, width) as x:
                j = o * width + x
                T.buffer_store(self.sc, self.power(self.sc[row, j] - new[0, 0]), [row, j])
            with T.vectorized(0, width) as x:
                T.buffer_store(acc, acc[0, x] + self.sc[row, o * width + x], [0, x])
        self._follow(row, new[0, 0], fold(acc, width, lambda a, b: a + b))

    def _follow(self, row: Any, new: Any, z: Any) -> None:
        """The row's maximum is now `new`, and weights below it that sum to `z` were added."""
        if self.block == self.panels:
            T.buffer_store(self.sum, z, [row, 0])
            return
        T.buffer_store(self.fade, self.power(self.top[row, 0] - new), [row, 0])
        T.buffer_store(self.top, new, [row, 0])
        T.buffer_store(self.sum, self.sum[row, 0] * self.fade[row, 0] + z, [row, 0])

    def _values(
        self, b: Any, h: Any, row: Any, number: Any, block: _Block, *, fading: bool
    ) -> None:
        bg, rows, start = b * self.G + h // self.group, self.rows, block.first * self.width
        online = self.block != self.panels
        tiles = number + (self.first_try.hidden_zero(bg) if online and self.first_try else 0)
        for at, (e0, width) in enumerate(self.columns):
            with T.serial(0, tiles) as t:
                keys = self.seen_by(row, t, block) * self.width
                if self.ragged:
                    keys = imin(keys, self.S - start)
                r0 = t * rows

                def put(i: Any, e: Any, o: Any, e0: int = e0, r0: Any = r0) -> None:
                    # Added at the end: were it the start, LLVM would keep all tiles in registers.
                    if online:
                        old = self.ot[r0 + i, e0 + e]
                        o = o + (old * self.fade[r0 + i, 0] if fading else old)
                    T.buffer_store(self.ot, o, [r0 + i, e0 + e])

                tile(
                    lambda i, k, r0=r0: self.sc[r0 + i, k],  # type: ignore[misc]
                    lambda k, e, at=at: self.vp[bg, at, start + k, e],  # type: ignore[misc]
                    keys,
                    put,
                    rows=rows,
                    width=width,
                )

    def _finish(self, b: Any, h: Any, row: Any, number: Any) -> None:
        """Divide by the sums and write."""
        with T.serial(0, number * self.rows) as i:
            if self.T % self.rows:
                with T.If(row + i < self.T), T.Then():
                    self._write_row(b, h, row, i)
            else:
                self._write_row(b, h, row, i)

    def _write_row(self, b: Any, h: Any, row: Any, i: Any) -> None:
        z = self.sum[i, 0]
        if self.facts.hides or self.facts.bias:
            z = at_least(z, TINY)
        # One division for a row; the definition divides each element, equal within rounding.
        T.buffer_store(self.fade, f32(1.0) / z, [i, 0])

        def put(e: Any) -> None:
            store(self.out, [b, h, row + i, e], self.ot[i, e] * self.fade[i, 0])

        vectors(self.E, self.lanes, put)


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a softmax attention made by the kit, None for anything else."""
    data = facts_of(func, NAME)
    if data is None:
        return None

    def write(facts: AttentionFacts, *tensors: Any) -> None:
        _Kernel(facts, target, *tensors).write()

    return tvm.s_tir.Schedule(written(func, data, write))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
