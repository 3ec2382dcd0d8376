"""Rule ``attention``: fused softmax attention with one row tile of scores in the cache.

K is packed once into panels of two vectors (both threads). Then each task (batch, head, eight
queries) computes its scores panel by panel in registers, applies masks while storing them into a
buffer [8, S], makes exponentials in place, and multiplies by V in registers. Key panels that no
query of the tile can see are skipped. Causal tiles are dealt out small with large, because TVM's
threads take equal contiguous shares of the tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM, TINY, AttentionFacts, broadcast, facts_of
from codegen.kernels.tiles import (
    ROWS,
    build,
    fill,
    fold,
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
from codegen.kernels.vector_math import at_least, f32, vexp_nonpositive
from codegen.rule import Rule
from codegen.target import Target

NAME = "attention"


@dataclass
class _Kernel:
    """Sizes, buffers and helpers of one kernel while it is written."""

    facts: AttentionFacts
    lanes: int
    q: Any
    k: Any
    v: Any
    key_mask: Any
    bias: Any
    out: Any

    def __post_init__(self) -> None:
        self.B, self.H, self.T, self.D = (int(n) for n in self.q.shape)
        self.G, self.S = int(self.k.shape[1]), int(self.k.shape[2])
        self.E, self.group = int(self.v.shape[3]), self.H // int(self.k.shape[1])
        self.offset, self.rows = self.S - self.T, min(ROWS, self.T)
        self.width = 2 * self.lanes
        self.panels = up(self.S, self.width) // self.width
        self.ragged = self.S % self.width != 0
        self.tiles = -(-self.T // self.rows)

    def write(self) -> None:
        """Emit the whole kernel."""
        self._pack()
        with T.parallel(0, self.B * self.H * self.tiles) as task:
            bh = task // self.tiles
            turn = task % self.tiles
            if self.facts.causal:
                turn = tirx.Select(turn % 2 == 0, turn // 2, self.tiles - 1 - turn // 2)
            self._task(bh // self.H, bh % self.H, turn * self.rows)

    def _pack(self) -> None:
        """K panels [B G, S/width, D, width], V padded to whole vectors, masks padded to S."""
        self.kp = scratch(self.B * self.G, self.panels, self.D, self.width)
        with T.parallel(0, self.B * self.G * self.panels) as n:
            bg, p = n // self.panels, n % self.panels
            b, g = bg // self.G, bg % self.G
            with T.serial(0, self.width) as x, T.serial(0, self.D) as d:
                # Keys after the last repeat it; their scores are hidden later.
                j = imin(p * self.width + x, self.S - 1)
                T.buffer_store(self.kp, load(self.k, b, g, j, d), [bg, p, d, x])
        padded = self.panels * self.width
        if self.E % self.lanes:
            self.vp = scratch(self.B * self.G, self.S, up(self.E, self.lanes))
            with T.parallel(0, self.B * self.G * self.S) as n, T.serial(0, self.vp.shape[2]) as e:
                bg, j = n // self.S, n % self.S
                value = load(self.v, bg // self.G, bg % self.G, j, imin(e, self.E - 1))
                T.buffer_store(self.vp, value, [bg, j, e])
        if self.key_mask is not None:
            batch = int(self.key_mask.shape[0])
            self.km = scratch(batch, padded)
            with T.serial(0, batch) as b, T.serial(0, padded) as j:
                seen = self.key_mask[b, imin(j, self.S - 1)]
                T.buffer_store(self.km, tirx.Select(seen, f32(1.0), f32(0.0)), [b, j])

    def _span(self, row: Any) -> tuple[Any, Any]:
        """First and one-past-last key panel that a tile starting at query `row` can see."""
        first: Any = 0
        last: Any = self.S
        here = row + self.offset
        right = [0] if self.facts.causal else []
        if self.facts.window is not None:
            left, ahead = self.facts.window
            first, right = imax(here - left, 0), [*right, ahead]
        if right:
            last = imax(imin(here + self.rows + min(right), self.S), 0)
        first = first // self.width if self.facts.window is not None else 0
        last = (last + self.width - 1) // self.width
        return first, imax(last, first) if right else self.panels

    def _task(self, b: Any, h: Any, row: Any) -> None:
        g, rows, width = h // self.group, self.rows, self.width
        qs, sc = scratch(rows, self.D), scratch(rows, self.panels * width)
        total = scratch(rows, 1)
        with T.serial(0, rows) as i:
            # Rows after the last repeat it and are not written back.
            def put(d: Any, i: Any = i) -> None:
                x = load(self.q, b, h, imin(row + i, self.T - 1), d)
                T.buffer_store(qs, x * f32(self.facts.scale), [i, d])

            vectors(self.D, self.lanes, put)
        first, last = self._span(row)
        with T.serial(0, last - first) as turn:
            p = first + turn
            tile(
                lambda i, d: qs[i, d],
                lambda d, x: self.kp[b * self.G + g, p, d, x],
                self.D,
                lambda i, x, s: T.buffer_store(
                    sc, self._masked(b, h, row + i, p * width + x, s), [i, p * width + x]
                ),
                rows=rows,
                width=width,
            )
        self._softmax(sc, total, first, last)
        self._values(b, h, g, row, sc, total, first, last)

    def _masked(self, b: Any, h: Any, i: Any, j: Any, score: Any) -> Any:
        facts, masks = self.facts, []
        if self.bias is not None:
            at = (b, h, imin(i, self.T - 1), imin(j, self.S - 1) if self.ragged else j)
            value = broadcast(_Call(self.bias), at)
            if facts.bias == "hide":
                masks.append(value)
            else:
                score = score + (
                    value if str(self.bias.dtype) == "float32" else tirx.Cast("float32", value)
                )
        if self.key_mask is not None:
            masks.append(broadcast(_Call(self.km), (b, j)) > f32(0.5))
        if self.ragged:
            masks.append(j < self.S)
        seen = facts.seen(i, j, self.offset, masks)
        return score if seen is None else tirx.Select(seen, score, f32(float("-inf")))

    def _softmax(self, sc: Any, total: Any, first: Any, last: Any) -> None:
        """Exponentials in place of the scores, their sum into `total`."""
        width, start = self.width, first * self.width
        with T.serial(0, self.rows) as i:
            row = i
            top, acc = scratch(1, 1), scratch(1, width)
            steps = last - first if not isinstance(last, int) else self.panels * width
            peak = reduce_row(steps, width, lambda j: sc[row, start + j], tirx.max, MINIMUM)
            T.buffer_store(top, peak, [0, 0])
            fill(acc, 1, width)
            with T.serial(0, last - first) as o:
                with T.vectorized(0, width) as x:
                    j = start + o * width + x
                    T.buffer_store(sc, vexp_nonpositive(sc[i, j] - top[0, 0]), [i, j])
                with T.vectorized(0, width) as x:
                    T.buffer_store(acc, acc[0, x] + sc[i, start + o * width + x], [0, x])
            z = fold(acc, width, lambda a, b: a + b)
            if self.facts.hides or self.facts.bias:
                z = at_least(z, TINY)
            T.buffer_store(total, z, [i, 0])

    def _values(
        self, b: Any, h: Any, g: Any, row: Any, sc: Any, total: Any, first: Any, last: Any
    ) -> None:
        padded = self.E % self.lanes != 0
        start = first * self.width
        number = imax(imin(last * self.width, self.S) - start, 0)
        ot = scratch(self.rows, up(self.E, self.lanes))
        for e0, width in panels(self.E, self.lanes):

            def value(k: Any, e: Any, e0: int = e0) -> Any:
                if padded:
                    return self.vp[b * self.G + g, start + k, e0 + e]
                return load(self.v, b, g, start + k, e0 + e)

            tile(
                lambda i, k: sc[i, start + k],
                value,
                number,
                lambda i, e, o, e0=e0: T.buffer_store(  # type: ignore[misc]
                    ot, o / total[i, 0], [i, e0 + e]
                ),
                rows=self.rows,
                width=width,
            )
        with T.serial(0, self.rows) as i, T.If(row + i < self.T), T.Then():
            vectors(self.E, self.lanes, lambda e: store(self.out, [b, h, row + i, e], ot[i, e]))


class _Call:
    """A buffer that is indexed by a call, as a tensor is."""

    def __init__(self, buffer: Any) -> None:
        self.buffer, self.shape = buffer, buffer.shape

    def __call__(self, *index: Any) -> Any:
        return self.buffer[index]


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a softmax attention made by the kit, None for anything else."""
    data = facts_of(func, NAME)
    if data is None:
        return None
    facts = AttentionFacts.from_json(data)

    def body(*args: Any) -> None:
        q, k, v, *rest, out = args
        key_mask, bias = facts.split(rest)
        _Kernel(facts, target.lanes, q, k, v, key_mask, bias, out).write()

    return tvm.s_tir.Schedule(build(func, body))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
