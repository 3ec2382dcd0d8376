"""Rule ``hash_codes``: kernelised hashing in register tiles, from rows to packed words."""

from __future__ import annotations

from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.hamming import TINY, WORD, u32
from codegen.kernels.tiles import (
    ROWS,
    build,
    imin,
    load,
    panels,
    reduce_row,
    scratch,
    tile,
    up,
    vectors,
)
from codegen.kernels.vector_math import at_least, f32, vexp
from codegen.rule import Rule
from codegen.target import Target

NAME = "hash_codes"


class _Hash:
    def __init__(
        self, lanes: int, x: Any, anchors: Any, centre: Any, mix: Any, rate: Any, out: Any
    ) -> None:
        self.lanes, self.x, self.out, self.rate = lanes, x, out, rate
        self.anchors, self.centre, self.mix = anchors, centre, mix
        self.B, self.H, self.T, self.D = (int(n) for n in x.shape)
        self.G, self.m, self.bits = int(anchors.shape[0]), int(anchors.shape[2]), int(mix.shape[2])
        self.mp, self.bp = up(self.m, lanes), up(self.bits, lanes)
        self.share, self.words = self.H // self.G, int(out.shape[3])

    def write(self) -> None:
        """Padded copies of the hash, then tiles of rows."""
        self.ap, self.wp = scratch(self.G, self.D, self.mp), scratch(self.G, self.m, self.bp)
        self.offset, self.middle = scratch(self.G, self.mp), scratch(self.G, self.mp)
        with T.serial(0, self.G) as g:
            self._prepare(g)
        rows = min(ROWS, self.T)
        tiles = -(-self.T // rows)
        with T.parallel(0, self.B * self.H * tiles) as n:
            bh = n // tiles
            self._rows(bh // self.H, bh % self.H, (n % tiles) * rows, rows)

    def _prepare(self, g: Any) -> None:
        m, lanes = self.m, self.lanes
        with T.serial(0, self.D) as d, T.serial(0, self.mp) as j:
            T.buffer_store(self.ap, self.anchors[g, d, imin(j, m - 1)], [g, d, j])
        with T.serial(0, m) as j, T.serial(0, self.bp) as r:
            T.buffer_store(self.wp, self.mix[g, j, imin(r, self.bits - 1)], [g, j, r])
        with T.serial(0, self.mp) as j:
            T.buffer_store(self.middle, self.centre[g, imin(j, m - 1)], [g, j])
        vectors(self.mp, lanes, lambda j: T.buffer_store(self.offset, f32(1.0), [g, j]))
        with T.serial(0, self.D) as d:
            vectors(
                self.mp,
                lanes,
                lambda j: T.buffer_store(
                    self.offset,
                    self.offset[g, j] + self.ap[g, d, j] * self.ap[g, d, j],
                    [g, j],
                ),
            )
        vectors(
            self.mp,
            lanes,
            lambda j: T.buffer_store(self.offset, self.offset[g, j] * self.rate[g], [g, j]),
        )

    def _rows(self, b: Any, h: Any, row: Any, rows: int) -> None:
        g, lanes = h // self.share, self.lanes
        scale, kernel = scratch(rows, 1), scratch(rows, self.mp)
        marks = T.sblock_alloc_buffer((rows, self.bp), "uint32")

        def value(i: Any, d: Any) -> Any:
            return load(self.x, b, h, imin(row + i, self.T - 1), d)

        with T.serial(0, rows) as i:
            square = reduce_row(
                self.D, lanes, lambda d: value(i, d) * value(i, d), lambda p, q: p + q, 0.0
            )
            length = at_least(tirx.sqrt(square), TINY)
            T.buffer_store(scale, (self.rate[g] + self.rate[g]) / length, [i, 0])
        for j0, width in panels(self.m, lanes):
            tile(
                value,
                lambda d, j, j0=j0: self.ap[g, d, j0 + j],  # type: ignore[misc]
                self.D,
                lambda i, j, s, j0=j0: T.buffer_store(  # type: ignore[misc]
                    kernel,
                    vexp(s * scale[i, 0] - self.offset[g, j0 + j]) - self.middle[g, j0 + j],
                    [i, j0 + j],
                ),
                rows=rows,
                width=width,
            )
        for r0, width in panels(self.bits, lanes):
            tile(
                lambda i, j: kernel[i, j],
                lambda j, r, r0=r0: self.wp[g, j, r0 + r],  # type: ignore[misc]
                self.m,
                lambda i, r, s, r0=r0: T.buffer_store(  # type: ignore[misc]
                    marks,
                    tirx.Select(s > f32(0.0), u32(1) << tirx.Cast("uint32", r0 % WORD + r), u32(0)),
                    [i, r0 + r],
                ),
                rows=rows,
                width=width,
            )
        with T.serial(0, rows) as i, T.If(row + i < self.T), T.Then():
            self._pack(marks, i, [b, h, row + i])

    def _pack(self, marks: Any, i: Any, at: list[Any]) -> None:
        word = T.sblock_alloc_buffer((1,), "uint32")
        for w in range(self.words):
            T.buffer_store(word, u32(0), [0])
            with T.serial(0, min(WORD, self.bits - w * WORD)) as r:
                T.buffer_store(word, word[0] | marks[i, w * WORD + r], [0])
            T.buffer_store(self.out, word[0], [*at, w])


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a hash made by the kit, None for anything else."""
    if facts_of(func, NAME) is None:
        return None
    return tvm.s_tir.Schedule(build(func, lambda *args: _Hash(target.lanes, *args).write()))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
