"""Rule ``attention_bf16``: softmax attention whose two products multiply pairs of bfloat16.

Tasks, blocks and masks are those of `attention`. What differs:

- q (scaled first), k and v are rounded to bfloat16 once and packed as pairs: neighbouring channels
  of q and k, neighbouring keys of v. One vdpbf16ps adds 32 products to 16 sums in float32.
- Exponentials (in base 2, cubic: their error is a fiftieth of a rounding step) are taken of float32
  scores in registers and leave them as pairs.
- Row sums add the rounded weights, by one more vdpbf16ps with ones: a weighted mean then has
  weights that sum to 1 exactly as they are used, and v that is the same everywhere is the result.
"""

from __future__ import annotations

import itertools
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM, AttentionFacts, facts_of
from codegen.kernels.tiles import fill, fold, imin, load, reduce_row, scratch, up, vectors
from codegen.kernels.vector_math import f32
from codegen.rule import Rule
from codegen.schedules import _pairs as two
from codegen.schedules._bounded_softmax import Bounded
from codegen.schedules._softmax_kernel import written
from codegen.schedules._tasks import block_panels
from codegen.schedules.attention import _LOG2E, _Block, _Kernel
from codegen.target import Target

NAME = "attention_bf16"


class _BoundedPairs(Bounded):
    """The first try on pairs."""

    def measure(self, bg: Any, p: Any) -> None:
        """Squared lengths of the keys of one packed panel."""
        kernel, width = self.kernel, self.kernel.width
        for x in range(0, width, two.LANES):
            acc = scratch(1, two.LANES)
            fill(acc, 1, two.LANES)
            with T.serial(0, kernel.depth) as d:
                key = two.pairs(kernel.kp, bg, p, d, x)
                two.put(acc, [0, 0], two.dot(two.floats(acc, 0, 0), key, key))
            two.put(self.squares, [bg, p * width + x], two.floats(acc, 0, 0))

    def square(self, i: Any) -> Any:
        """The squared length of query i of the task."""
        acc = scratch(1, two.LANES)
        fill(acc, 1, two.LANES)
        for d in range(0, self.kernel.padded // 2, two.LANES):
            value = two.pairs(self.kernel.qs, i, d)
            two.put(acc, [0, 0], two.dot(two.floats(acc, 0, 0), value, value))
        return fold(acc, two.LANES, lambda a, b: a + b)

    def scores(self, b: Any, h: Any, row: Any, number: Any, block: Any) -> None:
        """Weights of one block as pairs, straight from the register tiles, and their sums."""
        kernel = self.kernel

        def take(acc: Any, r0: Any, turn: Any) -> None:
            for i in range(kernel.rows):
                made = two.scratch_pairs(1, two.LANES)
                low, high = (two.floats(column, i, 0) for column in acc)
                two.put(made, [0, 0], two.powers(low, high))
                two.put(kernel.weights, [r0 + i, turn * two.LANES], two.pairs(made, 0, 0))
                total = two.dot(
                    two.floats(self.parts, r0 + i, 0), two.pairs(made, 0, 0), two.ones()
                )
                two.put(self.parts, [r0 + i, 0], total)

        kernel.each_tile(b, h, row, number, block, take, lambda i: self.start[i, 0])


class _Pairs(_Kernel):
    """`attention` on pairs of bfloat16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.width == two.CHUNK
        self.depth, self.padded = -(-self.D // 2), up(self.D, two.CHUNK)
        self.block = block_panels(self.panels, self.width, 2 * self.target.l1_bytes)

    def _pack(self) -> None:
        """K [B G, S/width, D/2, width], V [B G, E/width, S/2, width] as pairs; what is hidden."""
        heads, half = self.B * self.G, self.width // 2
        self.kp = two.scratch_pairs(heads, self.panels, self.depth, self.width)
        if self.bounded:
            self.first_try = _BoundedPairs(self)
        self.vp = two.scratch_pairs(heads, len(self.columns), self.panels * half, self.width)
        marks = two.imported(self.target)
        with T.parallel(0, heads * self.panels, annotations=marks) as n:
            bg, p = n // self.panels, n % self.panels
            b, g = bg // self.G, bg % self.G
            with T.serial(0, self.width) as x:
                j = imin(p * self.width + x, self.S - 1)  # the last again, hidden later
                key = self._rounded(lambda d, j=j: load(self.k, b, g, j, d))
                with T.serial(0, self.depth) as d:
                    T.buffer_store(self.kp, key[0, d], [bg, p, d, x])
            with T.serial(0, half) as x:
                self._pack_values(b, g, p, x)
            if self.first_try is not None:
                self.first_try.measure(bg, p)
        if self.key_mask is not None or self.ragged:
            self._limits()

    def _rounded(self, value: Any) -> Any:
        """value(d) for d < D as pairs [1, padded / 2], zeros after the last."""
        wide, made = scratch(1, self.padded), two.scratch_pairs(1, self.padded // 2)
        if self.padded != self.D:
            two.zero(wide, 1, self.padded)
        vectors(self.D, self.lanes, lambda d: T.buffer_store(wide, value(d), [0, d]))
        for d in range(0, self.padded, two.CHUNK):
            low, high = two.floats(wide, 0, d), two.floats(wide, 0, d + two.LANES)
            two.put(made, [0, d // 2], two.pack(low, high))
        return made

    def _pack_values(self, b: Any, g: Any, p: Any, x: Any) -> None:
        """Pair x of the keys of panel p."""
        bg, half = b * self.G + g, self.width // 2
        for at, (e0, width) in enumerate(self.columns):
            wide, whole = scratch(2, width), min(width, self.E - e0)
            if whole < width:
                two.zero(wide, 2, width)
            for n in range(2):
                j = imin(p * self.width + 2 * x + n, self.S - 1)

                def put(e: Any, n: int = n, j: Any = j, e0: int = e0, wide: Any = wide) -> None:
                    T.buffer_store(wide, load(self.v, b, g, j, e0 + e), [n, e])

                vectors(whole, self.lanes, put)
            for e in range(0, width, two.LANES):
                pair = two.weave(two.floats(wide, 0, e), two.floats(wide, 1, e))
                two.put(self.vp, [bg, at, p * half + x, e], pair)

    def _queries(self, b: Any, h: Any, row: Any, count: Any, most: int) -> None:
        self.qs = two.scratch_pairs(most, self.padded // 2)
        self.weights = two.scratch_pairs(most, self.block * self.width // 2)
        self.sc = scratch(most, self.block * self.width)
        with T.serial(0, count) as i:
            at = imin(row + i, self.T - 1)
            query = self._rounded(lambda d, at=at: load(self.q, b, h, at, d) * f32(self.scale))
            for d in range(0, self.padded // 2, two.LANES):
                two.put(self.qs, [i, d], two.pairs(query, 0, d))

    def products(self, bg: Any, p: Any, r0: Any, start: Any) -> list[Any]:
        """start(i) + the scores of queries r0 + i of the task with key panel p."""
        return two.pair_tile(
            lambda i, d: self.qs[r0 + i, d],
            lambda d, x: two.pairs(self.kp, bg, p, d, x),
            self.depth,
            rows=self.rows,
            width=self.width,
            start=start,
        )

    def _softmax(self, row: Any, number: Any, block: _Block) -> None:
        """Weights of one row's scores as pairs, its maximum and sum, how far old ones fade."""
        width, lanes = self.width, two.LANES
        new, acc, wide = scratch(1, 1), scratch(1, lanes), scratch(2, lanes)
        made = two.scratch_pairs(1, lanes)
        steps = number * width if isinstance(number, int) else number
        peak = reduce_row(steps, width, lambda j: self.sc[row, j], tirx.max, MINIMUM)
        T.buffer_store(new, tirx.max(peak, self.top[row, 0]), [0, 0])
        fill(acc, 1, lanes)
        with T.serial(0, number) as o:
            with T.unroll(0, 2) as n, T.vectorized(0, lanes) as x:
                below = self.sc[row, o * width + n * lanes + x] - new[0, 0]
                if not self.bounded:  # a bias that is added: logits are to the base e
                    below = below * f32(_LOG2E)
                T.buffer_store(wide, below, [n, x])
            two.put(made, [0, 0], two.powers(two.floats(wide, 0, 0), two.floats(wide, 1, 0)))
            two.put(self.weights, [row, o * lanes], two.pairs(made, 0, 0))
            total = two.dot(two.floats(acc, 0, 0), two.pairs(made, 0, 0), two.ones())
            two.put(acc, [0, 0], total)
        self._follow(row, new[0, 0], fold(acc, lanes, lambda a, b: a + b))

    def _values(
        self, b: Any, h: Any, row: Any, number: Any, block: _Block, *, fading: bool
    ) -> None:
        bg, half = b * self.G + h // self.group, self.width // 2
        start, online = block.first * half, self.block != self.panels
        tiles = number + (self.first_try.hidden_zero(bg) if online and self.first_try else 0)
        for at, (e0, width) in enumerate(self.columns):
            with T.serial(0, tiles) as t:
                seen = self.seen_by(row, t, block) * half
                if self.ragged:
                    seen = imin(seen, (self.S + 1) // 2 - start)
                r0 = t * self.rows
                acc = two.pair_tile(
                    lambda i, k, r0=r0: self.weights[r0 + i, k],  # type: ignore[misc]
                    lambda k, e, at=at: two.pairs(self.vp, bg, at, start + k, e),  # type: ignore[misc]
                    seen,
                    rows=self.rows,
                    width=width,
                )
                for i, (n, column) in itertools.product(range(self.rows), enumerate(acc)):
                    o, e = two.floats(column, i, 0), e0 + n * two.LANES
                    # Added at the end: were it the start, LLVM would keep all tiles in registers.
                    if online:
                        old = two.floats(self.ot, r0 + i, e)
                        fade = tirx.Broadcast(self.fade[r0 + i, 0], two.LANES)
                        o = o + (old * fade if fading else old)
                    two.put(self.ot, [r0 + i, e], o)


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a softmax attention marked for bfloat16, None for anything else."""
    data = facts_of(func, NAME)
    if data is None or not two.has_pairs(target):
        return None

    def write(facts: AttentionFacts, *tensors: Any) -> None:
        _Pairs(facts, target, *tensors).write()

    return tvm.s_tir.Schedule(written(func, data, write))


RULE = Rule(NAME, apply, order=10)
