"""The k best keys of a row of scores: the limit that separates them from the others.

It is searched by value: a first guess as if logits were normal, steps by the slope of the normal
distribution until there is one limit on either side, then interpolation between the two, and every
third time a bisection of the bits, which ends the search whatever the values are. A limit that
separates exactly k keys ends it at once, mostly after some five counts.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM
from codegen.kernels.row_attention import FINITE, ROUNDS
from codegen.kernels.tiles import fill, fold, imax, imin, reduce_row, scratch
from codegen.kernels.vector_math import at_least, f32, vexp_weight

LARGE = 1e30  # above any distance of a visible key
Value = Callable[[Any], Any]


class Row:
    """One row of scores while its best keys are searched.

    `panels` panels of `width` scores; `at(j)` reads the row and `put(j, value)` writes it. `share`
    is the expected part of the keys that are among the best.
    """

    def __init__(
        self, panels: Any, width: int, at: Value, put: Callable[[Any, Any], None], share: float
    ) -> None:
        self.panels, self.width, self.at, self.put = panels, width, at, put
        normal = NormalDist()
        self.quantile = normal.inv_cdf(min(max(1.0 - share, 1e-3), 1.0 - 1e-6))
        self.slope = 1.2 / normal.pdf(self.quantile)  # a step too long brackets
        self.mean, self.spread, self.seen = (scratch(1, 1) for _ in range(3))

    def each(self, body: Callable[[Any], None]) -> None:
        """body(j) in vectors over the row."""
        with T.serial(0, self.panels) as o, T.vectorized(0, self.width) as x:
            body(o * self.width + x)

    def totals(self, *values: Value, before: Callable[[Any], None] | None = None) -> list[Any]:
        """Sums over the row in one pass, each in a buffer [1, 1]; `before(j)` comes first."""
        lanes, steps = self.width, self.panels
        if isinstance(steps, int) and steps % 2 == 0:
            lanes, steps = 2 * lanes, steps // 2  # more sums side by side: additions take time
        sums = [scratch(1, lanes) for _ in values]
        for acc in sums:
            fill(acc, 1, lanes)
        with T.serial(0, steps) as o:
            if before is not None:
                with T.vectorized(0, lanes) as x:
                    before(o * lanes + x)
            for acc, value in zip(sums, values, strict=True):
                with T.vectorized(0, lanes) as x:
                    T.buffer_store(acc, acc[0, x] + value(o * lanes + x), [0, x])
        found = [scratch(1, 1) for _ in values]
        for acc, into in zip(sums, found, strict=True):
            T.buffer_store(into, fold(acc, lanes, lambda a, b: a + b), [0, 0])
        return found

    def distances(self, keep: Callable[[Any, Any], None]) -> None:
        """Scores become distances below their maximum; keep(j, e^-distance); their statistics."""
        length = self.panels * self.width if isinstance(self.panels, int) else self.panels
        peak = scratch(1, 1)
        T.buffer_store(peak, reduce_row(length, self.width, self.at, tirx.max, MINIMUM), [0, 0])

        def replace(j: Any) -> None:
            self.put(j, peak[0, 0] - self.at(j))

        def visible(term: Value) -> Value:
            return lambda j: tirx.Select(self.at(j) < f32(LARGE), term(self.at(j)), f32(0.0))

        terms: tuple[Value, ...] = (lambda d: d, lambda d: d * d, lambda _: f32(1.0))
        one, two, seen = self.totals(*map(visible, terms), before=replace)
        self.each(lambda j: keep(j, vexp_weight(f32(0.0) - self.at(j))))
        inverse = f32(1.0) / at_least(seen[0, 0], 1.0)
        T.buffer_store(self.seen, seen[0, 0], [0, 0])
        T.buffer_store(self.mean, one[0, 0] * inverse, [0, 0])
        variance = two[0, 0] * inverse - self.mean[0, 0] * self.mean[0, 0]
        T.buffer_store(self.spread, tirx.sqrt(at_least(variance, 1e-20)), [0, 0])

    def limit(self, some: int) -> Best:
        """The `some` nearest keys but for those as far as the last; all where there are no more."""
        best = Best(self, some)
        with T.If(self.seen[0, 0] <= f32(float(some))):
            with T.Then():
                T.buffer_store(best.whole, _i32(FINITE), [0])
                T.buffer_store(best.count, self.seen[0, 0], [0, 0])
            with T.Else():
                best.search()
        return best


class Best:
    """The keys of a row up to a limit: `has(j)`; `count` [1, 1] of them."""

    def __init__(self, row: Row, some: int) -> None:
        self.row, self.some = row, some
        self.low, self.high, self.half, self.whole = (_ints(1) for _ in range(4))
        self.below, self.above, self.near, self.guess = (scratch(1, 1) for _ in range(4))
        self.count = self.below  # of the keys up to the limit, when the search has ended
        T.buffer_store(self.low, _i32(0), [0])
        T.buffer_store(self.high, _i32(FINITE), [0])
        T.buffer_store(self.below, f32(0.0), [0, 0])
        T.buffer_store(self.above, row.seen[0, 0], [0, 0])
        start = row.mean[0, 0] - f32(row.quantile) * row.spread[0, 0]
        T.buffer_store(self.guess, start, [0, 0])

    def has(self, j: Any) -> Any:
        """Whether key j is among them."""
        return _bits(self.row.at(j)) <= self.whole[0]

    def search(self) -> None:
        """Find the limit: the bits of the `some`-th smallest distance, or of one just above it."""
        low, high = self.low, self.high
        T.buffer_store(self.whole, _i32(-1), [0])
        with T.serial(0, 3 * ROUNDS) as turn, T.If(low[0] < high[0]), T.Then():
            middle = low[0] + ((high[0] - low[0]) >> _i32(1))
            wanted = tirx.Select(turn % 3 == 2, middle, _bits(at_least(self.guess[0, 0], 0.0)))
            T.buffer_store(self.half, imin(imax(wanted, low[0]), high[0] - 1), [0])

            def inside(j: Any) -> Any:
                near = _bits(self.row.at(j)) <= self.half[0]
                return tirx.Select(near, f32(1.0), f32(0.0))

            T.buffer_store(self.near, self.row.totals(inside)[0][0, 0], [0, 0])
            self._narrow()
            self._guess()
        with T.If(self.whole[0] < 0), T.Then():
            T.buffer_store(self.whole, high[0] - 1, [0])

    def _narrow(self) -> None:
        """Put the limit just counted on its side."""
        some, near = f32(float(self.some)), self.near[0, 0]
        with T.If(near <= some):
            with T.Then():
                T.buffer_store(self.below, near, [0, 0])
                T.buffer_store(self.low, self.half[0] + 1, [0])
                with T.If(near == some), T.Then():
                    T.buffer_store(self.whole, self.half[0], [0])
                    T.buffer_store(self.low, self.high[0], [0])
            with T.Else():
                T.buffer_store(self.high, self.half[0], [0])
                T.buffer_store(self.above, near, [0, 0])

    def _guess(self) -> None:
        """The next limit: between the two at hand, or a step from the only one."""
        start, end, wanted = _float(self.low[0]), _float(self.high[0]), f32(self.some + 0.5)
        part = (wanted - self.below[0, 0]) / (self.above[0, 0] - self.below[0, 0] + f32(1.0))
        one_side = tirx.any(self.high[0] == _i32(FINITE), self.low[0] == _i32(0))
        with T.If(one_side):
            with T.Then():
                slope = self.row.spread[0, 0] * f32(self.row.slope) / self.row.seen[0, 0]
                step = (wanted - self.near[0, 0]) * slope
                T.buffer_store(self.guess, _float(self.half[0]) + step, [0, 0])
            with T.Else():
                T.buffer_store(self.guess, start + (end - start) * part, [0, 0])

    def fill_up(self, keys: Any) -> None:
        """Take the first of the `keys` keys that are as far as the limit, while there is room.

        They get a distance below all, so their weights must have been taken before.
        """
        row = self.row
        some = tirx.min(row.seen[0, 0], f32(float(self.some)))
        with T.If(self.count[0, 0] < some), T.Then(), T.serial(0, keys) as j:
            equal = tirx.all(_bits(row.at(j)) == self.high[0], self.count[0, 0] < some)
            with T.If(equal), T.Then():
                row.put(j, f32(-1.0))
                T.buffer_store(self.count, self.count[0, 0] + f32(1.0), [0, 0])


def _ints(n: int) -> Any:
    return T.sblock_alloc_buffer((n,), "int32")


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")


def _bits(x: Any) -> Any:
    return tirx.reinterpret("int32", x)


def _float(x: Any) -> Any:
    return tirx.reinterpret("float32", x)
