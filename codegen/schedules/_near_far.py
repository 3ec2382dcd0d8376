"""What kernels share that meet near keys one by one and the others by sums over blocks.

A task takes some rows of one block: weights of the keys of its own block and those beside it, and
features read from the sums of all other blocks (`far`). Letters as in passes/site.py; C tokens a
block, R features. Values have a one behind the last channel, which carries the denominator along.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.tiles import (
    ROWS,
    imax,
    imin,
    load,
    panels,
    scratch,
    store,
    tile,
    vectors,
)
from codegen.kernels.vector_math import f32


class NearFar(ABC):
    """Stages of such a kernel; the class beside it has the tensors and sizes (`Sizes`)."""

    B: int
    H: int
    G: int
    T: int
    E: int
    R: int
    C: int
    Ep: int  # E and the one, in whole vectors
    Rp: int  # R in whole tiles
    near: int  # keys met one by one
    blocks: int
    columns: int  # keys read, those beyond the last token included
    group: int
    lanes: int
    fk: Any
    v: Any
    out: Any
    values: Any
    turned: Any
    part: Any
    far: Any

    @abstractmethod
    def read_tile(self, b: Any, h: Any, block: Any, part: Any) -> None:
        """Write a tile of rows of one block."""

    def turn(self, keys: Any, width: int) -> None:
        """turned[bg, d, j] = keys[b, g, j, d]; the last token again for those beyond it."""
        with T.parallel(0, self.B * self.G * width) as n, T.serial(0, self.columns) as j:
            bg, d = n // width, n % width
            value = load(keys, bg // self.G, bg % self.G, imin(j, self.T - 1), d)
            T.buffer_store(self.turned, value, [bg, d, j])

    def widen(self, shown: Callable[[Any, Any], Any]) -> None:
        """The values of a token j with shown(b, j), a one, zeros; all zero for any other."""
        with T.parallel(0, self.B * self.G * self.columns) as n:
            bg, j = n // self.columns, n % self.columns
            self._each(self.Ep, self.values, [bg, j], lambda e: f32(0.0))
            b, g = bg // self.G, bg % self.G
            with T.If(shown(b, j)), T.Then():
                self._each(self.E, self.values, [bg, j], lambda e: load(self.v, b, g, j, e))
                T.buffer_store(self.values, f32(1.0), [bg, j, self.E])

    def sums(self, shown: Callable[[Any, Any], Any] | None = None) -> None:
        """part[bg, n] = the sums of features times values over block n, of shown(b, j) alone."""
        with T.parallel(0, self.B * self.G * self.blocks) as n:
            self._sum(n // self.blocks, n % self.blocks, shown)

    def _sum(self, bg: Any, block: Any, shown: Any) -> None:
        b, g, first = bg // self.G, bg % self.G, block * self.C
        number = imin(self.C, self.T - first) if self.T % self.C else self.C
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
                    when=None if shown is None else lambda j: shown(b, first + j),
                )

    def add_part(self, run: Any, bg: Any, n: Any, r: Any) -> None:
        """run[0] += row r of part[bg, n]."""
        self._each(self.Ep, run, [0], lambda e: run[0, e] + self.part[bg, n, r, e])

    def read(self) -> None:
        """All rows, tile by tile."""
        tiles = -(-self.C // min(ROWS, self.C))
        with T.parallel(0, self.B * self.H * self.blocks * tiles) as n:
            bh, rest = n // (self.blocks * tiles), n % (self.blocks * tiles)
            self.read_tile(bh // self.H, bh % self.H, rest // tiles, rest % tiles)

    def first_near(self, block: Any) -> Any:
        """The first of the keys near a block."""
        return imax(block - 1, 0) * self.C

    def token(self, block: Any, row: Any) -> Any:
        """The token of a row of a block; the last one again beyond the end."""
        return imin(block * self.C + imin(row, self.C - 1), self.T - 1)

    def copy(self, rows: int, width: int, out: Any, value: Callable[[Any, Any], Any]) -> None:
        """value(i, j) in a scratch buffer, so that its place is found once."""
        with T.serial(0, rows) as i:
            self._each(width, out, [i], lambda j: value(i, j))

    def near_products(
        self, rows: Any, width: int, bg: Any, first: Any, put: Callable[[Any, Any, Any], None]
    ) -> None:
        """put(i, j, s): s is row i of `rows`, `width` values, times the near key j."""
        for j0, columns in panels(self.near, self.lanes):
            tile(
                lambda i, d: rows[i, d],
                lambda d, j, j0=j0: self.turned[bg, d, first + j0 + j],  # type: ignore[misc]
                width,
                lambda i, j, s, j0=j0: put(i, j0 + j, s),  # type: ignore[misc]
                rows=min(ROWS, self.C),
                width=columns,
            )

    def write_rows(
        self, at: tuple[Any, Any, Any, Any], state: Any, weights: Any, features: Any, least: float
    ) -> None:
        """Divide and write the rows from `at` (batch, head, block, row) on.

        `weights` of the keys near times their values, and `features` times far[state, block];
        the denominator is at least `least`.
        """
        (b, h, block, row), rows = at, min(ROWS, self.C)
        bg, first, result = (
            b * self.G + h // self.group,
            self.first_near(block),
            scratch(rows, self.Ep),
        )
        for e0, width in panels(self.Ep, self.lanes):
            near = (
                self.near,
                lambda i, j: weights[i, j],
                lambda j, e, e0=e0: self.values[bg, first + j, e0 + e],
            )
            far = (
                self.R,
                lambda i, r: features[i, r],
                lambda r, e, e0=e0: self.far[state, block, r, e0 + e],
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
                self._divide([b, h, self.token(block, row + i)], result, i, least)

    def _divide(self, at: list[Any], result: Any, i: Any, least: float) -> None:
        factor = scratch(1, 1)
        T.buffer_store(factor, f32(1.0) / tirx.max(result[i, self.E], f32(least)), [0, 0])
        put = lambda e: store(self.out, [*at, e], result[i, e] * factor[0, 0])  # noqa: E731
        vectors(self.E, self.lanes, put)

    def _each(self, width: int, out: Any, at: list[Any], value: Callable[[Any], Any]) -> None:
        """out[*at, j] = value(j) for j < width."""
        vectors(width, self.lanes, lambda j: T.buffer_store(out, value(j), [*at, j]))
