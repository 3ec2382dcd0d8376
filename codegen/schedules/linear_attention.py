"""Rule ``linear_attention``: bidirectional and causal, in register tiles.

Bidirectional: the state of each (batch, key head) is summed in parallel pieces of the sequence,
the pieces are added, and row tiles read it. Causal: each (batch, key head) walks its chunks in
order with the state in the cache; scores above the diagonal are neither computed nor read.
"""

from __future__ import annotations

from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.linear_attention import CHUNK
from codegen.kernels.tiles import (
    ROWS,
    build,
    fill,
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
from codegen.kernels.vector_math import at_least, f32
from codegen.rule import Rule
from codegen.target import Target

NAME = "linear_attention"
PIECE = 256  # least tokens of one parallel piece of the state
TASKS = 16  # pieces are made until there are about this many tasks


class _Shared:
    """Sizes and buffers of either kernel."""

    def __init__(self, eps: float, lanes: int, args: tuple[Any, ...]) -> None:
        self.eps, self.lanes = eps, lanes
        self.q, self.k, self.v, self.out = *args[:3], args[-1]
        self.mask = args[3] if len(args) == 5 else None
        self.B, self.H, self.T, self.R = (int(n) for n in self.q.shape)
        self.G, self.S, self.E = (
            int(self.k.shape[1]), int(self.k.shape[2]), int(self.v.shape[3]),
        )  # fmt: skip
        self.group, self.Ep = self.H // self.G, up(self.E, lanes)
        self.Rp = up(self.R, ROWS)

    def seen(self, b: Any, j: Any) -> Any:
        """Whether the key mask shows key j; None without a mask."""
        if self.mask is None:
            return None
        return self.mask[0 if int(self.mask.shape[0]) == 1 else b, j]

    def weight(self, q_row: Any, z: Any, bottom: Any, i: Any) -> None:
        """bottom[i] += q_row . z over R features."""
        dot = reduce_row(self.R, self.lanes, lambda r: q_row(r) * z(r), lambda a, b: a + b, 0.0)
        T.buffer_store(bottom, bottom[i, 0] + dot, [i, 0])


class _Whole(_Shared):
    """Bidirectional."""

    def write(self) -> None:
        heads = self.B * self.G
        self.pieces = max(1, min(self.S // PIECE, -(-TASKS // heads)))
        self.length = -(-self.S // self.pieces)
        self.vp = self.v
        if self.E % self.lanes:
            self.vp = scratch(self.B, self.G, self.S, self.Ep)
            with T.parallel(0, heads * self.S) as n, T.serial(0, self.Ep) as e:
                bg, j = n // self.S, n % self.S
                at = [bg // self.G, bg % self.G, j]
                T.buffer_store(self.vp, load(self.v, *at, imin(e, self.E - 1)), [*at, e])
        self.part = scratch(heads, self.pieces, self.Rp, self.Ep)
        self.part_z = scratch(heads, self.pieces, self.Rp)
        with T.parallel(0, heads * self.pieces) as n:
            self._sum_piece(n // self.pieces, n % self.pieces)
        if self.pieces > 1:
            with T.parallel(0, heads) as bg:
                self._join(bg)
        rows = min(ROWS, self.T)
        tiles = -(-self.T // rows)
        with T.parallel(0, self.B * self.H * tiles) as n:
            bh = n // tiles
            self._read(bh // self.H, bh % self.H, (n % tiles) * rows, rows)

    def _sum_piece(self, bg: Any, piece: Any) -> None:
        b, g, first = bg // self.G, bg % self.G, piece * self.length
        number = imin(self.length, self.S - first) if self.S % self.pieces else self.length
        when = None if self.mask is None else lambda j: self.seen(b, first + j)
        with T.serial(0, self.Rp // ROWS) as block:
            r0 = block * ROWS
            for e0, width in panels(self.E, self.lanes):
                tile(
                    # Features after the last repeat it; nothing reads their sums.
                    lambda i, j: load(self.k, b, g, first + j, imin(r0 + i, self.R - 1)),
                    lambda j, e, e0=e0: load(self.vp, b, g, first + j, e0 + e),  # type: ignore[misc]
                    number,
                    lambda i, e, s, e0=e0: T.buffer_store(  # type: ignore[misc]
                        self.part, s, [bg, piece, r0 + i, e0 + e]
                    ),
                    width=width,
                    when=when,
                )
        zero = lambda r: T.buffer_store(self.part_z, f32(0.0), [bg, piece, r])  # noqa: E731
        vectors(self.R, self.lanes, zero)

        def add(j: Any) -> None:
            vectors(
                self.R,
                self.lanes,
                lambda r: T.buffer_store(
                    self.part_z,
                    self.part_z[bg, piece, r] + load(self.k, b, g, first + j, r),
                    [bg, piece, r],
                ),
            )

        with T.serial(0, number) as j:
            if when is None:
                add(j)
            else:
                with T.If(when(j)), T.Then():
                    add(j)

    def _join(self, bg: Any) -> None:
        """Add all pieces into the first."""
        with T.serial(1, self.pieces) as p:
            with T.serial(0, self.Rp) as r:
                vectors(
                    self.Ep,
                    self.lanes,
                    lambda e: T.buffer_store(
                        self.part,
                        self.part[bg, 0, r, e] + self.part[bg, p, r, e],
                        [bg, 0, r, e],
                    ),
                )
            vectors(
                self.R,
                self.lanes,
                lambda r: T.buffer_store(
                    self.part_z, self.part_z[bg, 0, r] + self.part_z[bg, p, r], [bg, 0, r]
                ),
            )

    def _read(self, b: Any, h: Any, row: Any, rows: int) -> None:
        bg = b * self.G + h // self.group
        bottom, ot = scratch(rows, 1), scratch(rows, self.Ep)

        def query(i: Any, r: Any) -> Any:
            return load(self.q, b, h, imin(row + i, self.T - 1), r)

        with T.unroll(0, rows) as i:
            T.buffer_store(bottom, f32(0.0), [i, 0])
            self.weight(lambda r: query(i, r), lambda r: self.part_z[bg, 0, r], bottom, i)
            T.buffer_store(bottom, at_least(bottom[i, 0], self.eps), [i, 0])
        for e0, width in panels(self.E, self.lanes):
            tile(
                query,
                lambda r, e, e0=e0: self.part[bg, 0, r, e0 + e],  # type: ignore[misc]
                self.R,
                lambda i, e, s, e0=e0: T.buffer_store(  # type: ignore[misc]
                    ot, s / bottom[i, 0], [i, e0 + e]
                ),
                rows=rows,
                width=width,
            )
        with T.serial(0, rows) as i, T.If(row + i < self.T), T.Then():
            vectors(self.E, self.lanes, lambda e: store(self.out, [b, h, row + i, e], ot[i, e]))


class _Causal(_Shared):
    """Causal, one task for each (batch, key head)."""

    def write(self) -> None:
        self.width = 2 * self.lanes
        self.size = up(min(CHUNK, self.T), max(self.width, ROWS))
        self.offset = self.S - self.T
        with T.parallel(0, self.B * self.G) as bg:
            b, g = bg // self.G, bg % self.G
            self.state, self.z = scratch(self.Rp, self.Ep), scratch(1, self.Rp)
            self.kc, self.vc = scratch(self.size, self.Rp), scratch(self.size, self.Ep)
            self.kt = scratch(self.size // self.width, self.R, self.width)
            fill(self.state, self.Rp, self.Ep)
            fill(self.z, 1, self.Rp)
            if self.offset < 0:
                self._blind(b, g)
            with T.serial(0, -(-self.S // self.size)) as c:
                start = c * self.size
                self._load(b, g, start)
                with T.If(start + self.size > self.offset), T.Then():
                    number = self.size // ROWS
                    with T.serial(0, self.group * number) as n:
                        self._rows(b, g * self.group + n // number, start, n % number)
                self._absorb()

    def _blind(self, b: Any, g: Any) -> None:
        """Queries before the first key see nothing."""
        with T.grid(self.group, min(-self.offset, self.T), self.E) as (part, i, e):
            store(self.out, [b, g * self.group + part, i, e], f32(0.0))

    def _load(self, b: Any, g: Any, start: Any) -> None:
        """One chunk of keys (as rows and as panels) and values; zero where there is no key."""
        with T.serial(0, self.size) as x:
            j = imin(start + x, self.S - 1)
            here = start + x < self.S
            seen = self.seen(b, j)
            here = here if seen is None else tirx.all(here, seen)
            zero_k = lambda r: T.buffer_store(self.kc, f32(0.0), [x, r])  # noqa: E731
            zero_v = lambda e: T.buffer_store(self.vc, f32(0.0), [x, e])  # noqa: E731
            vectors(self.Rp, self.lanes, zero_k)
            vectors(self.Ep, self.lanes, zero_v)
            with T.If(here), T.Then():
                vectors(
                    self.R,
                    self.lanes,
                    lambda r: T.buffer_store(self.kc, load(self.k, b, g, j, r), [x, r]),
                )
                vectors(
                    self.E,
                    self.lanes,
                    lambda e: T.buffer_store(self.vc, load(self.v, b, g, j, e), [x, e]),
                )
            with T.serial(0, self.R) as r:
                T.buffer_store(self.kt, self.kc[x, r], [x // self.width, r, x % self.width])

    def _rows(self, b: Any, h: Any, start: Any, block: Any) -> None:
        """Eight queries of a chunk."""
        row = block * ROWS
        sc, ot, bottom = scratch(ROWS, self.size), scratch(ROWS, self.Ep), scratch(ROWS, 1)

        def query(i: Any, r: Any) -> Any:
            at = tirx.min(tirx.max(start + row + i - self.offset, 0), self.T - 1)
            return load(self.q, b, h, at, r)

        used = (row + ROWS + self.width - 1) // self.width
        with T.serial(0, used) as p:
            tile(
                query,
                lambda r, x: self.kt[p, r, x],
                self.R,
                lambda i, x, s: T.buffer_store(
                    sc,
                    tirx.Select(p * self.width + x <= row + i, s, f32(0.0)),
                    [i, p * self.width + x],
                ),
                width=self.width,
            )
        plus = lambda a, b: a + b  # noqa: E731
        with T.serial(0, ROWS) as i:
            inside = reduce_row(used + 0, self.width, lambda x: sc[i, x], plus, 0.0)
            T.buffer_store(bottom, inside, [i, 0])
            self.weight(lambda r: query(i, r), lambda r: self.z[0, r], bottom, i)
            T.buffer_store(bottom, at_least(bottom[i, 0], self.eps), [i, 0])
        for e0, width in panels(self.E, self.lanes):
            inner = (row + ROWS, lambda i, x: sc[i, x], lambda x, e, e0=e0: self.vc[x, e0 + e])
            before = (self.R, query, lambda r, e, e0=e0: self.state[r, e0 + e])
            tile(
                query,
                query,
                [inner, before],
                lambda i, e, s, e0=e0: T.buffer_store(  # type: ignore[misc]
                    ot, s / bottom[i, 0], [i, e0 + e]
                ),
                width=width,
            )
        with T.serial(0, ROWS) as i:
            at = start + row + i - self.offset
            with T.If(tirx.all(at >= 0, at < self.T)), T.Then():
                vectors(self.E, self.lanes, lambda e: store(self.out, [b, h, at, e], ot[i, e]))

    def _absorb(self) -> None:
        """Add the chunk to the state."""
        with T.serial(0, self.Rp // ROWS) as block:
            r0 = block * ROWS
            for e0, width in panels(self.E, self.lanes):
                tile(
                    lambda i, x: self.kc[x, r0 + i],
                    lambda x, e, e0=e0: self.vc[x, e0 + e],  # type: ignore[misc]
                    self.size,
                    lambda i, e, s, e0=e0: T.buffer_store(  # type: ignore[misc]
                        self.state, s, [r0 + i, e0 + e]
                    ),
                    width=width,
                    start=lambda i, e, e0=e0: self.state[r0 + i, e0 + e],  # type: ignore[misc]
                )
        with T.serial(0, self.size) as x:
            vectors(
                self.R,
                self.lanes,
                lambda r: T.buffer_store(self.z, self.z[0, r] + self.kc[x, r], [0, r]),
            )


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a linear attention made by the kit, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    kind = _Causal if facts["causal"] else _Whole

    def body(*args: Any) -> None:
        kind(float(facts["eps"]), target.lanes, args).write()

    return tvm.s_tir.Schedule(build(func, body))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
