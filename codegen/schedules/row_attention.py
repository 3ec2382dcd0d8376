"""Rule ``row_attention``: softmax attention with a change of each row, in the tiles of `attention`.

A task takes eight queries of one head: all their scores (in registers, panel by panel), then the
change row by row, then the values in register tiles. ``top`` searches a limit for each row
(codegen/schedules/_top.py).
"""

from __future__ import annotations

from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM, AttentionFacts, broadcast, facts_of
from codegen.kernels.row_attention import RowFacts
from codegen.kernels.tiles import build, imin, reduce_row, scratch, tile
from codegen.kernels.vector_math import at_least, at_most, f32, vexp_nonpositive, vexp_weight
from codegen.kernels.views import take_layout
from codegen.rule import Rule
from codegen.schedules._top import LARGE, Row
from codegen.schedules.attention import _Block, _Kernel
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
        weight = score * broadcast(self.bias, at)
        if self.limit is None:
            return weight
        most = broadcast(self.limit, (b, j))  # infinite, below 0 for a hidden key
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
    """The best keys of each row count one by one; with `rest` the others share what they weigh.

    The row becomes its weights, so values are multiplied as ever: reading those of the best alone
    costs more, up to some thousand keys (a register tile takes a key in two cycles).
    """

    def _keys(self, b: Any, h: Any, row: Any, number: Any, block: _Block) -> None:
        self._scores(b, h, row, number, block)
        panels = self.seen_by(row, 0, block)
        self.weights = scratch(1, self.panels * self.width)
        with T.serial(0, self.rows) as i:
            self._choose(i, panels, imin(panels * self.width, self.S))
        self._values(b, h, row, number, block, fading=False)

    def _choose(self, i: Any, panels: Any, keys: Any) -> None:
        some, sc, weights = min(self.change.best, self.S), self.sc, self.weights

        def put(j: Any, value: Any) -> None:
            T.buffer_store(sc, value, [i, j])

        share = some / (0.6 * self.S if self.facts.causal else self.S)
        row = Row(panels, self.width, lambda j: sc[i, j], put, share)
        row.distances(lambda j, w: T.buffer_store(weights, w, [0, j]))
        best = row.limit(some)
        best.fill_up(keys)
        zero = f32(0.0)
        top, rest = row.totals(
            lambda j: tirx.Select(best.has(j), weights[0, j], zero),
            lambda j: tirx.Select(best.has(j), zero, weights[0, j]),
        )
        part = rest[0, 0] if self.change.rest else zero
        T.buffer_store(self.sum, top[0, 0] + part, [i, 0])
        T.buffer_store(top, part / at_least(row.seen[0, 0] - best.count[0, 0], 1.0), [0, 0])

        def weight(j: Any) -> None:
            other = tirx.Select(row.at(j) < f32(LARGE), top[0, 0], zero)
            row.put(j, tirx.Select(best.has(j), weights[0, j], other))

        row.each(weight)


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
