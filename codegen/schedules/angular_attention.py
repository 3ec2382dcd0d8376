"""Rule ``angular_attention``: sums of chosen values by the tables of ``hamming_attention``.

A query's row is read from the tables, gets its own value, length one, and the convolution of the
values around it, all in one pass.
"""

from __future__ import annotations

import math
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.hamming import TINY, u32
from codegen.kernels.tiles import build, load, reduce_row, scratch, store
from codegen.kernels.vector_math import at_least, f32
from codegen.rule import Rule
from codegen.schedules.hamming_attention import Tables
from codegen.target import Target

NAME = "angular_attention"


class _Angular(Tables):
    def __init__(self, bits: int, lanes: int, args: tuple[Any, ...]) -> None:
        facts = {"bits": bits, "beta": 0.0, "own": True, "eps": 0.0}
        super().__init__(facts, lanes, (*args[:3], *args[4:]))
        self.conv, self.taps = args[3], int(args[3].shape[1])

    def take(self, value: Any, turn: Any) -> Any:
        """The value where the bit is set, else nothing."""
        return tirx.Select(turn == u32(0), value, f32(0.0))

    def shown(self, b: Any, g: Any, j: Any, e: Any) -> Any:
        """A value, 0 where the mask hides it."""
        value = load(self.v, b, g, j, e)
        if self.mask is None:
            return value
        return tirx.if_then_else(self.seen(b, j), value, f32(0.0))

    def read(self, b: Any, h: Any, i: Any) -> None:
        """One query."""
        g = h // self.share
        bg = b * self.G + g
        at, y = T.sblock_alloc_buffer((self.tables,), "int32"), scratch(1, self.Ep)
        near, inverse = scratch(1, self.Ep), scratch(1, 1)
        for n in range(self.tables):
            T.buffer_store(at, self.entry(self.q, [b, h, i], n), [n])

        def add(e: Any) -> None:
            total = self.sums[bg, 0, 0, at[0], e]
            for n in range(1, self.tables):
                total = total + self.sums[bg, 0, n, at[n], e]
            own = self.shown(b, g, i, e) * f32(0.5)
            T.buffer_store(y, total * f32(1 / math.pi) + own, [0, e])
            T.buffer_store(near, f32(0.0), [0, e])

        self.each(add)
        square = reduce_row(
            self.E, self.lanes, lambda e: y[0, e] * y[0, e], lambda p, q: p + q, 0.0
        )
        T.buffer_store(inverse, f32(1.0) / at_least(tirx.sqrt(square), TINY), [0, 0])
        with T.serial(0, self.taps) as t:
            j = i + t - self.taps // 2
            inside = tirx.all(j >= 0, j < self.S)
            with T.If(inside), T.Then():
                self.each(
                    lambda e: T.buffer_store(
                        near,
                        near[0, e] + self.conv[g, t] * self.shown(b, g, j, e),
                        [0, e],
                    )
                )
        self.each(lambda e: store(self.out, [b, h, i, e], y[0, e] * inverse[0, 0] + near[0, e]))


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of an angular attention made by the kit, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    bits = int(facts["bits"])
    return tvm.s_tir.Schedule(build(func, lambda *args: _Angular(bits, target.lanes, args).write()))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
