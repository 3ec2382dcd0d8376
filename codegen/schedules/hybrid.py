"""Rule ``hybrid``: softmax near a query, features far from it, in register tiles.

States of all blocks are summed in parallel, added up from either end, then tiles of rows read
both. A column of ones beside the values carries the denominator along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.hybrid import LOWEST, HybridFacts, Sizes
from codegen.kernels.tiles import (
    ROWS,
    build,
    fill,
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
from codegen.kernels.vector_math import f32, vexp_weight
from codegen.rule import Rule
from codegen.target import Target

NAME = "hybrid"


class _Hybrid(Sizes):
    def __init__(self, facts: HybridFacts, lanes: int, args: Sequence[Any]) -> None:
        super().__init__(facts, args[:-1], args[-1])
        self.lanes, self.Ep = lanes, up(self.E + 1, lanes)
        self.Rp, self.width = up(self.R, ROWS), up(self.near, lanes)
        self.columns = self.T + self.width  # keys read beyond the last token are hidden
        heads = self.B * self.G
        self.values = scratch(heads, self.columns, self.Ep)
        self.turned = scratch(heads, self.D, self.columns)
        self.keep = scratch(self.B, self.columns)
        self.part = scratch(heads, self.blocks, self.Rp, self.Ep)
        self.far = scratch(heads, self.blocks, self.Rp, self.Ep)

    def write(self) -> None:
        heads = self.B * self.G
        with T.parallel(0, heads * self.columns) as n:
            self._widen(n // self.columns, n % self.columns)
        with T.parallel(0, heads * self.D) as n, T.serial(0, self.columns) as j:
            bg, d = n // self.D, n % self.D
            value = load(self.k, bg // self.G, bg % self.G, imin(j, self.T - 1), d)
            T.buffer_store(self.turned, value, [bg, d, j])
        with T.serial(0, self.B) as b, T.serial(0, self.columns) as j:
            shown = j < self.T
            if self.mask is not None:
                shown = tirx.all(shown, self.shown(b, imin(j, self.T - 1)))
            T.buffer_store(self.keep, tirx.Select(shown, f32(1.0), f32(0.0)), [b, j])
        with T.parallel(0, heads * self.blocks) as n:
            self._sum(n // self.blocks, n % self.blocks)
        with T.parallel(0, heads * self.Rp) as n:
            self._add_up(n // self.Rp, n % self.Rp)
        tiles = -(-self.C // min(ROWS, self.C))
        with T.parallel(0, self.B * self.H * self.blocks * tiles) as n:
            bh, rest = n // (self.blocks * tiles), n % (self.blocks * tiles)
            self._read(bh // self.H, bh % self.H, rest // tiles, rest % tiles)

    def _widen(self, bg: Any, j: Any) -> None:
        """The values of a token, a one, zeros; all zero after the last token."""
        fill_ = lambda e: T.buffer_store(self.values, f32(0.0), [bg, j, e])  # noqa: E731
        vectors(self.Ep, self.lanes, fill_)
        with T.If(j < self.T), T.Then():
            vectors(
                self.E,
                self.lanes,
                lambda e: T.buffer_store(
                    self.values, load(self.v, bg // self.G, bg % self.G, j, e), [bg, j, e]
                ),
            )
            T.buffer_store(self.values, f32(1.0), [bg, j, self.E])

    def _sum(self, bg: Any, block: Any) -> None:
        """The state of one block of keys."""
        b, g, first = bg // self.G, bg % self.G, block * self.C
        number = imin(self.C, self.T - first) if self.T % self.C else self.C
        when = None if self.mask is None else lambda j: self.shown(b, first + j)
        with T.serial(0, self.Rp // ROWS) as rows:
            r0 = rows * ROWS
            for e0, width in panels(self.Ep, self.lanes):
                tile(
                    # Features after the last repeat it; nothing reads their sums.
                    lambda i, j: load(self.fk, b, g, first + j, imin(r0 + i, self.R - 1)),
                    lambda j, e, e0=e0: self.values[bg, first + j, e0 + e],  # type: ignore[misc]
                    number,
                    lambda i, e, s, e0=e0: T.buffer_store(  # type: ignore[misc]
                        self.part, s, [bg, block, r0 + i, e0 + e]
                    ),
                    width=width,
                    when=when,
                )

    def _add_up(self, bg: Any, r: Any) -> None:
        """far of block n: the blocks up to n - 2, and (not causal) from n + 2 on."""
        run, last = scratch(1, self.Ep), self.blocks - 1

        def add(n: Any) -> None:
            vectors(
                self.Ep,
                self.lanes,
                lambda e: T.buffer_store(run, run[0, e] + self.part[bg, n, r, e], [0, e]),
            )

        fill(run, 1, self.Ep)
        with T.serial(0, self.blocks) as n:
            vectors(
                self.Ep,
                self.lanes,
                lambda e: T.buffer_store(self.far, run[0, e], [bg, n, r, e]),
            )
            with T.If(n > 0), T.Then():
                add(n - 1)
        if self.causal:
            return
        fill(run, 1, self.Ep)
        with T.serial(0, self.blocks - 2) as back:
            n = last - 2 - back
            add(n + 2)
            vectors(
                self.Ep,
                self.lanes,
                lambda e: T.buffer_store(
                    self.far, self.far[bg, n, r, e] + run[0, e], [bg, n, r, e]
                ),
            )

    def _read(self, b: Any, h: Any, block: Any, part: Any) -> None:
        """A tile of rows of one block."""
        rows = min(ROWS, self.C)
        row, bg = part * rows, b * self.G + h // self.group
        first = imax(block - 1, 0) * self.C  # of the keys near
        powers, result = scratch(rows, self.width), scratch(rows, self.Ep)
        query, features = scratch(rows, self.D), scratch(rows, self.R)

        def token(i: Any) -> Any:
            return imin(block * self.C + imin(row + i, self.C - 1), self.T - 1)

        scale = f32(self.facts.scale)
        self._copy(rows, self.D, query, lambda i, d: load(self.q, b, h, token(i), d) * scale)
        self._copy(rows, self.R, features, lambda i, r: load(self.fq, b, h, token(i), r))
        self._scores(b, bg, block, first, token, query, powers)
        with T.serial(0, rows) as i:
            self._powers(h, powers, i)
        for e0, width in panels(self.Ep, self.lanes):
            near = (
                self.near,
                lambda i, j: powers[i, j],
                lambda j, e, e0=e0: self.values[bg, first + j, e0 + e],
            )
            far = (
                self.R,
                lambda i, r: features[i, r],
                lambda r, e, e0=e0: self.far[bg, block, r, e0 + e],
            )
            tile(
                near[1],
                near[2],
                [near, far],
                lambda i, e, s, e0=e0: T.buffer_store(result, s, [i, e0 + e]),  # type: ignore[misc]
                rows=rows,
                width=width,
            )
        with T.serial(0, rows) as i:
            inside = tirx.all(row + i < self.C, block * self.C + row + i < self.T)
            with T.If(inside), T.Then():
                self._divide(b, h, token(i), result, i)

    def _copy(self, rows: int, width: int, out: Any, value: Any) -> None:
        """value(i, j) in a scratch buffer, so that its place is found once."""
        with T.serial(0, rows) as i:
            vectors(width, self.lanes, lambda j: T.buffer_store(out, value(i, j), [i, j]))

    def _divide(self, b: Any, h: Any, token: Any, result: Any, i: Any) -> None:
        factor = scratch(1, 1)
        safe = tirx.max(result[i, self.E], f32(self.facts.eps))
        T.buffer_store(factor, f32(1.0) / safe, [0, 0])
        vectors(
            self.E,
            self.lanes,
            lambda e: store(self.out, [b, h, token, e], result[i, e] * factor[0, 0]),
        )

    def _scores(
        self, b: Any, bg: Any, block: Any, first: Any, token: Any, query: Any, powers: Any
    ) -> None:
        """Logits of the keys near; hidden ones are LOWEST."""

        def put(i: Any, j: Any, s: Any) -> None:
            key = first + j
            seen = self.keep[b, key] > f32(0.0)
            last = token(i) + 1 if self.causal else (block + 2) * self.C
            seen = tirx.all(seen, key < last)
            T.buffer_store(powers, tirx.Select(seen, s, f32(LOWEST)), [i, j])

        for j0, width in panels(self.near, self.lanes):
            tile(
                lambda i, d: query[i, d],
                lambda d, j, j0=j0: self.turned[bg, d, first + j0 + j],  # type: ignore[misc]
                self.D,
                lambda i, j, s, j0=j0: put(i, j0 + j, s),  # type: ignore[misc]
                rows=min(ROWS, self.C),
                width=width,
            )

    def _powers(self, h: Any, powers: Any, i: Any) -> None:
        """exp(logit - maximum) times the head's share; 0 for a row without a key near."""
        top, share = scratch(1, 1), scratch(1, 1)
        peak = reduce_row(self.width, self.lanes, lambda j: powers[i, j], tirx.max, LOWEST)
        T.buffer_store(top, peak, [0, 0])
        part = f32(1.0) / (f32(1.0) + tirx.exp(f32(0.0) - load(self.mix, h)))
        some = tirx.Select(top[0, 0] > f32(LOWEST / 2), part, f32(0.0))
        T.buffer_store(share, some, [0, 0])
        vectors(
            self.width,
            self.lanes,
            lambda j: T.buffer_store(
                powers, vexp_weight(powers[i, j] - top[0, 0]) * share[0, 0], [i, j]
            ),
        )


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled hybrid kernel, None for anything else."""
    data = facts_of(func, NAME)
    if data is None:
        return None
    facts = HybridFacts.from_json(data)
    body = build(func, lambda *args: _Hybrid(facts, target.lanes, args).write())
    return tvm.s_tir.Schedule(body)


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
