"""Softmax without the maximum of a row, where a bound of its logits will do.

|q| |k| bounds every logit, so a row can start from c = max(bound - ROOM, 0) in place of its
maximum: no power of two overflows, and exponentials are taken of the scores while they are in
registers. What is lost is a logit more than about 126 below c. A row shows that by its sum, and the
task is then done again with the true maxima (`attention`). All logits are in base 2.
"""

from __future__ import annotations

import itertools
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.tiles import fill, fold, reduce_row, scratch, vectors
from codegen.kernels.vector_math import f32
from codegen.schedules._exp2 import power_of_two

ROOM = 80.0  # sums of 2^80 are far from overflow, values included
LOW, HIGH = 2.0**-90, 2.0**110  # sums of a row whose small terms were kept, and that is finite


class Bounded:
    """The first try of one kernel's tasks; `kernel` has its sizes and buffers."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.squares = scratch(kernel.B * kernel.G, kernel.panels * kernel.width)

    def measure(self, bg: Any, p: Any) -> None:
        """Squared lengths of the keys of one packed panel."""
        kernel, width = self.kernel, self.kernel.width
        acc = scratch(1, width)
        fill(acc, 1, width)
        with T.serial(0, kernel.D) as d, T.vectorized(0, width) as x:
            key = kernel.kp[bg, p, d, x]
            T.buffer_store(acc, acc[0, x] + key * key, [0, x])
        with T.vectorized(0, width) as x:
            T.buffer_store(self.squares, acc[0, x], [bg, p * width + x])

    def begin(self, bg: Any, rows: Any) -> None:
        """Scratch of a task; from where each of its rows starts."""
        kernel, width = self.kernel, self.kernel.width
        most = kernel.share * kernel.rows
        self.start, self.parts = scratch(most, 1), scratch(most, width)
        self.fine, longest = scratch(1, 1), scratch(1, 1)
        total = kernel.panels * width
        peak = reduce_row(total, width, lambda j: self.squares[bg, j], tirx.max, 0.0)
        T.buffer_store(longest, peak, [0, 0])
        with T.serial(0, rows) as i:
            bound = tirx.sqrt(self.square(i) * longest[0, 0])
            T.buffer_store(self.start, tirx.min(f32(ROOM) - bound, f32(0.0)), [i, 0])
            with T.vectorized(0, width) as x:
                T.buffer_store(self.parts, f32(0.0), [i, x])

    def square(self, i: Any) -> Any:
        """The squared length of query i of the task."""
        kernel = self.kernel
        lanes = kernel.lanes if kernel.D % kernel.lanes == 0 else 1
        acc = scratch(1, lanes)
        fill(acc, 1, lanes)
        with T.serial(0, kernel.D // lanes) as o, T.vectorized(0, lanes) as x:
            value = kernel.qs[i, o * lanes + x]
            T.buffer_store(acc, acc[0, x] + value * value, [0, x])
        return fold(acc, lanes, lambda a, b: a + b)

    def scores(self, b: Any, h: Any, row: Any, number: Any, block: Any) -> None:
        """Exponentials of one block's scores, straight from the register tiles, and their sums."""
        kernel = self.kernel
        lanes, power = kernel.lanes, power_of_two(kernel.target)

        def take(acc: Any, r0: Any, turn: Any) -> None:
            for i, (n, column) in itertools.product(range(kernel.rows), enumerate(acc)):
                power(column, i)
                with T.vectorized(0, lanes) as x:
                    weight, at = column[i, x], n * lanes + x
                    T.buffer_store(kernel.sc, weight, [r0 + i, turn * kernel.width + at])
                    T.buffer_store(self.parts, self.parts[r0 + i, at] + weight, [r0 + i, at])

        kernel.each_tile(b, h, row, number, block, take, lambda i: self.start[i, 0])

    def end(self, number: Any) -> None:
        """Sums of the rows, and whether all of them are fine."""
        kernel = self.kernel
        T.buffer_store(self.fine, f32(1.0), [0, 0])
        with T.serial(0, number * kernel.rows) as i:
            acc = scratch(1, kernel.width)
            vectors(
                kernel.width, kernel.width, lambda x: T.buffer_store(acc, self.parts[i, x], [0, x])
            )
            T.buffer_store(kernel.sum, fold(acc, kernel.width, lambda a, b: a + b), [i, 0])
            z = kernel.sum[i, 0]
            good = tirx.all(z >= f32(LOW), z <= f32(HIGH))
            T.buffer_store(self.fine, tirx.Select(good, self.fine[0, 0], f32(0.0)), [0, 0])

    def hidden_zero(self, bg: Any) -> Any:
        """Zero, which LLVM can not know: it unrolls no loop over tiles that has it in its length
        (unrolled, the sums of all tiles are held in registers at once, and spilled)."""
        return tirx.Select(self.squares[bg, 0] < f32(-1.0), 1, 0)

    def failed(self) -> Any:
        """Whether the task must be done again."""
        return self.fine[0, 0] < f32(1.0)
