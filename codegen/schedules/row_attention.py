"""Rule ``row_attention``: softmax attention with a change of each row, in the tiles of `attention`.

A task takes eight queries of one head: all their scores (in registers, panel by panel), then the
change row by row, then the values. ``clip`` and ``mix`` multiply weights and values in register
tiles; ``top`` reads the values of the chosen keys alone. The row's limit is found by bisection over
the bits of the distances below the row's maximum, which stops once it separates enough keys.
"""

from __future__ import annotations

from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM, AttentionFacts, broadcast, facts_of
from codegen.kernels.row_attention import FINITE, ROUNDS, RowFacts
from codegen.kernels.tiles import build, imax, imin, load, reduce_row, scratch, tile, vectors
from codegen.kernels.vector_math import at_least, at_most, f32, vexp_nonpositive, vexp_weight
from codegen.kernels.views import take_layout
from codegen.rule import Rule
from codegen.schedules.attention import _Block, _Call, _Kernel
from codegen.target import Target

NAME = "row_attention"
TINY = 1e-30


class _Whole(_Kernel):
    """A kernel whose only block holds all keys of a task's one row tile."""

    change: RowFacts
    bounded = False

    def start(self, change: RowFacts) -> None:
        """Write it."""
        self.change, self.block, self.share = change, self.panels, 1
        self.write()

    def _length(self, panels: Any) -> Any:
        """`reduce_row`'s length of so many panels."""
        return panels * self.width if isinstance(panels, int) else panels

    def _each(self, panels: Any, value: Any, into: Any, row: Any) -> None:
        """into[row, j] = value(j) over all keys of the panels."""
        with T.serial(0, panels) as o, T.vectorized(0, self.width) as x:
            T.buffer_store(into, value(o * self.width + x), [row, o * self.width + x])


class _Clip(_Whole):
    """Clipped softmax."""

    def _softmax(self, row: Any, number: Any, block: _Block) -> None:
        super()._softmax(row, number, block)
        low, factor = f32(self.change.gamma), f32(self.change.zeta - self.change.gamma)
        T.buffer_store(self.fade, factor / at_least(self.sum[row, 0], TINY), [row, 0])

        def value(j: Any) -> Any:
            return at_most(at_least(self.sc[row, j] * self.fade[row, 0] + low, 0.0), 1.0)

        self._each(number, value, self.sc, row)
        T.buffer_store(self.sum, f32(1.0), [row, 0])


class _Sum(_Whole):
    """Exponentials as they are."""

    def _softmax(self, row: Any, number: Any, block: _Block) -> None:
        # Rounding may lift a logit a little above 0.
        self._each(number, lambda j: vexp_nonpositive(self.sc[row, j]), self.sc, row)
        T.buffer_store(self.sum, f32(1.0), [row, 0])


class _Product(_Whole):
    """Products of features times factors, as they are."""

    def masked(self, b: Any, h: Any, i: Any, j: Any, score: Any) -> Any:
        at = (b, h, imin(i, self.T - 1), imin(j, self.S - 1) if self.ragged else j)
        weight = score * broadcast(_Call(self.bias), at)
        if self.limit is None:
            return weight
        most = broadcast(_Call(self.limit), (b, j))  # infinite, below 0 for a hidden key
        return tirx.Select(most < f32(0.0), f32(0.0), weight)

    def _softmax(self, row: Any, number: Any, block: _Block) -> None:
        total = reduce_row(
            self._length(number), self.width, lambda j: self.sc[row, j], lambda a, b: a + b, 0.0
        )
        T.buffer_store(self.sum, total, [row, 0])


class _Mix(_Whole):
    """Several keys at each key's place."""

    def _pack(self) -> None:
        width = self.D
        self.D = width * self.change.parts
        super()._pack()
        self.D = width

    def _scores(self, b: Any, h: Any, row: Any, number: Any, block: _Block) -> None:
        bg = b * self.G + h // self.group
        self.each_part = [self.sc] + [
            scratch(self.rows, self.panels * self.width) for _ in range(1, self.change.parts)
        ]
        with T.serial(0, block.last - block.first) as turn:
            for part, into in enumerate(self.each_part):

                def put(i: Any, x: Any, s: Any, into: Any = into) -> None:
                    at = (block.first + turn) * self.width + x
                    s = self.masked(b, h, row + i, at, s)
                    T.buffer_store(into, s, [i, turn * self.width + x])

                tile(
                    lambda i, d: self.qs[i, d],
                    lambda d, x, part=part: self.kp[  # type: ignore[misc]
                        bg, block.first + turn, part * self.D + d, x
                    ],
                    self.D,
                    put,
                    rows=self.rows,
                    width=self.width,
                )

    def _softmax(self, row: Any, number: Any, block: _Block) -> None:
        peak = scratch(1, 1)
        T.buffer_store(peak, f32(MINIMUM), [0, 0])
        for part in self.each_part:
            high = reduce_row(
                self._length(number),
                self.width,
                lambda j, part=part: part[row, j],  # type: ignore[misc]
                tirx.max,
                MINIMUM,
            )
            T.buffer_store(peak, tirx.max(peak[0, 0], high), [0, 0])

        def value(j: Any) -> Any:
            total: Any = None
            for part in self.each_part:
                power = vexp_weight(part[row, j] - peak[0, 0])
                total = power if total is None else total + power
            return total

        self._each(number, value, self.sc, row)
        z = reduce_row(
            self._length(number),
            self.width,
            lambda j: self.sc[row, j],
            lambda a, b: a + b,
            0.0,
        )
        T.buffer_store(self.sum, z, [row, 0])


class _Top(_Whole):
    """Only the best keys of each row, and what the others weigh together."""

    def write(self) -> None:
        if self.change.rest:
            self._prefix()
        super().write()

    def _prefix(self) -> None:
        """Sums of the visible values before key j (without a causal mask: of all), their number."""
        causal, heads = self.facts.causal, self.B * self.G
        places = self.S + 1 if causal else 1
        self.past, self.seen = scratch(heads, places, self.E), scratch(self.B, places)
        with T.parallel(0, heads) as bg:
            vectors(self.E, self.lanes, lambda e: T.buffer_store(self.past, f32(0.0), [bg, 0, e]))
            with T.serial(0, self.S) as j:

                def add(e: Any, j: Any = j) -> None:
                    value = self._if_seen(
                        bg // self.G, j, load(self.v, bg // self.G, bg % self.G, j, e)
                    )
                    old, new = (j, j + 1) if causal else (0, 0)
                    T.buffer_store(self.past, self.past[bg, old, e] + value, [bg, new, e])

                vectors(self.E, self.lanes, add)
        with T.serial(0, self.B) as b:
            T.buffer_store(self.seen, f32(0.0), [b, 0])
            with T.serial(0, self.S) as j:
                old, new = (j, j + 1) if causal else (0, 0)
                one = self._if_seen(b, j, f32(1.0))
                T.buffer_store(self.seen, self.seen[b, old] + one, [b, new])

    def _if_seen(self, b: Any, j: Any, value: Any) -> Any:
        if self.key_mask is None:
            return value
        return tirx.Select(broadcast(_Call(self.key_mask), (b, j)), value, f32(0.0))

    def _keys(self, b: Any, h: Any, row: Any, number: Any, block: _Block) -> None:
        self._scores(b, h, row, number, block)
        panels = self.seen_by(row, 0, block)
        self.weights = scratch(1, self.panels * self.width)
        self.chosen, self.number = _ints(self.S + 1), _ints(1)
        with T.serial(0, self.rows) as i:
            self._choose(i, panels, imin(panels * self.width, self.S))
            self._take(b, h, i, block.first * self.width)
            if self.change.rest:
                self._remainder(b, h, imin(row + i, self.T - 1), i, panels)

    def _choose(self, i: Any, panels: Any, keys: Any) -> None:
        """Weights of all keys, and the list of the best."""
        some, sc, number = min(self.change.best, self.S), self.sc, self.number
        length, peak = self._length(panels), scratch(1, 1)
        high = reduce_row(length, self.width, lambda j: sc[i, j], tirx.max, MINIMUM)
        T.buffer_store(peak, high, [0, 0])
        self._each(panels, lambda j: peak[0, 0] - sc[i, j], sc, i)
        self._each(panels, lambda j: vexp_weight(f32(0.0) - sc[i, j]), self.weights, 0)
        limit, whole = self._limit(i, length, some)
        T.buffer_store(number, _i32(0), [0])
        with T.serial(0, keys) as j, T.If(_bits(sc[i, j]) <= whole), T.Then():
            self._add(j)
        with T.If(number[0] < some), T.Then(), T.serial(0, keys) as j:
            equal = tirx.all(_bits(sc[i, j]) == limit, number[0] < some)
            with T.If(equal), T.Then():
                self._add(j)

    def _add(self, j: Any) -> None:
        T.buffer_store(self.chosen, j, [self.number[0]])
        T.buffer_store(self.number, self.number[0] + 1, [0])

    def _limit(self, i: Any, length: Any, some: int) -> tuple[Any, Any]:
        """(bits of the some-th smallest distance, those up to which all keys are taken)."""
        low, high, half, whole = (_ints(1) for _ in range(4))
        count = scratch(1, 1)
        T.buffer_store(low, _i32(0), [0])
        T.buffer_store(high, _i32(FINITE), [0])
        T.buffer_store(whole, _i32(-1), [0])
        with T.serial(0, ROUNDS), T.If(low[0] < high[0]), T.Then():
            T.buffer_store(half, low[0] + ((high[0] - low[0]) >> _i32(1)), [0])

            def near(j: Any) -> Any:
                return tirx.Select(_bits(self.sc[i, j]) <= half[0], f32(1.0), f32(0.0))

            got = reduce_row(length, self.width, near, lambda a, b: a + b, 0.0)
            T.buffer_store(count, got, [0, 0])
            with T.If(count[0, 0] < f32(float(some))):
                with T.Then():
                    T.buffer_store(low, half[0] + 1, [0])
                with T.Else():
                    T.buffer_store(high, half[0], [0])
                    with T.If(count[0, 0] == f32(float(some))), T.Then():
                        T.buffer_store(low, half[0], [0])
                        T.buffer_store(whole, half[0], [0])
        return high[0], imax(whole[0], high[0] - 1)

    def _take(self, b: Any, h: Any, i: Any, start: Any) -> None:
        """Sum the weighted values of the chosen keys; their weights are 0 from then on."""
        weight, total = scratch(1, 1), scratch(1, 1)
        self.left = scratch(1, self.E)
        T.buffer_store(total, f32(0.0), [0, 0])
        vectors(self.E, self.lanes, lambda e: T.buffer_store(self.left, f32(0.0), [0, e]))
        with T.serial(0, self.number[0]) as n:
            j = self.chosen[n]
            T.buffer_store(weight, self.weights[0, j], [0, 0])
            T.buffer_store(self.weights, f32(0.0), [0, j])
            T.buffer_store(total, total[0, 0] + weight[0, 0], [0, 0])

            def add(e: Any, key: Any = start + j) -> None:
                value = load(self.v, b, h // self.group, key, e)
                T.buffer_store(self.ot, self.ot[i, e] + weight[0, 0] * value, [i, e])
                if self.change.rest:
                    T.buffer_store(self.left, self.left[0, e] + value, [0, e])

            vectors(self.E, self.lanes, add)
        T.buffer_store(self.sum, total[0, 0], [i, 0])

    def _remainder(self, b: Any, h: Any, token: Any, i: Any, panels: Any) -> None:
        """Add the weight of the keys that were not chosen times the mean of their values."""
        bg, end, rest, share = b * self.G + h // self.group, 0, scratch(1, 1), scratch(1, 1)
        if self.facts.causal:
            end = imax(imin(token + self.offset + 1, self.S), 0)
        total = reduce_row(
            self._length(panels), self.width, lambda j: self.weights[0, j], lambda a, c: a + c, 0.0
        )
        T.buffer_store(rest, total, [0, 0])
        others = self.seen[b, end] - tirx.Cast("float32", self.number[0])
        T.buffer_store(share, rest[0, 0] / at_least(others, 1.0), [0, 0])

        def add(e: Any) -> None:
            value = (self.past[bg, end, e] - self.left[0, e]) * share[0, 0]
            T.buffer_store(self.ot, self.ot[i, e] + value, [i, e])

        vectors(self.E, self.lanes, add)
        T.buffer_store(self.sum, self.sum[i, 0] + rest[0, 0], [i, 0])


def _ints(n: int) -> Any:
    return T.sblock_alloc_buffer((n,), "int32")


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")


def _bits(x: Any) -> Any:
    return tirx.reinterpret("int32", x)


_KERNELS: dict[str, type[_Whole]] = {
    "clip": _Clip,
    "mix": _Mix,
    "product": _Product,
    "sum": _Sum,
    "top": _Top,
}


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a row attention made by the kit, None for anything else."""
    data = facts_of(func, NAME)
    if data is None:
        return None
    layout = take_layout(data, 3)
    change = RowFacts.from_json(data.pop("change"))
    facts = AttentionFacts.from_json(data)
    assert layout is not None

    def body(*args: Any) -> None:
        *inputs, out = args
        (q, k, v), rest = layout.split(inputs)
        key_mask, bias = facts.split(rest)
        view = layout.output(out, (*q.shape[:3], v.shape[3]))
        _KERNELS[change.kind](facts, target, q, k, v, key_mask, bias, view).start(change)

    return tvm.s_tir.Schedule(build(func, body))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
