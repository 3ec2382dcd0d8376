"""Feature maps written into a block of features that stays in the cache (for fused kernels).

A block holds one row of `width` features for each token, padded to whole vectors; features that
only fill up a vector are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM
from codegen.kernels.folds import all_lanes, power_of_two, put, row_sums, sums, whole
from codegen.kernels.tiles import (
    ROWS,
    imin,
    load,
    panels,
    reduce_row,
    scratch,
    tile,
    up,
    vectors,
)
from codegen.kernels.vector_math import _EXP5, _SHIFT, at_least, at_most, f32
from codegen.schedules._fetch import fetch_row

Seen = Callable[[Any], Any]
AHEAD = 64  # tokens from asking for a row to reading it; 32 and 128 are no different
_LOG2E = math.log2(math.e)
# 2^r for |r| <= 1/2: even and odd powers, highest first.
_POWERS = [c * math.log(2) ** (5 - n) for n, c in enumerate(_EXP5)]
_ODD, _EVEN = _POWERS[0::2], _POWERS[1::2]
_SAFE = 2.0**100  # sums up to this one hold exponentials of numbers within 100 of zero
_CLAMP = 126.0


class Rows:
    """The features of x [B, H, T, D], `rows` tokens at a time, `height` at most."""

    width: int  # features of a token, padded

    def __init__(self, x: Any, lanes: int, height: int) -> None:
        self.x, self.lanes = x, lanes
        self.B, self.H, self.T, self.D = (int(n) for n in x.shape)
        self.rows = min(height, self.T)
        self.ragged = self.T % self.rows != 0  # whether a tile may reach beyond the last token

    def pack(self) -> None:
        """Emit what is done once, before any block."""

    def block(self, b: Any, h: Any, first: Any, tiles: Any, out: Any, seen: Seen | None) -> None:
        """out[i, :] = the features of token first + i, i < tiles * rows.

        `seen(token)`: whether the token counts; its features are zero if not. Without it tokens
        after the last repeat it.
        """
        raise NotImplementedError

    def fetch(self, b: Any, h: Any, token: Any) -> None:
        """Ask for the row that comes `AHEAD` tokens after `token`."""
        fetch_row(self.x, b, h, imin(token + AHEAD, self.T - 1))

    def token(self, i: Any) -> Any:
        """A token that exists."""
        return imin(i, self.T - 1) if self.ragged else i


class Elu(Rows):
    """elu(x) + 1."""

    def __init__(self, x: Any, lanes: int, height: int) -> None:
        super().__init__(x, lanes, height)
        self.width = up(self.D, max(lanes, ROWS))

    def block(self, b: Any, h: Any, first: Any, tiles: Any, out: Any, seen: Seen | None) -> None:
        """See `Rows`."""
        with T.serial(0, tiles * self.rows) as i:
            token = first + i
            self.fetch(b, h, token)

            def put(d: Any) -> None:
                y = load(self.x, b, h, self.token(token), d)
                value = at_least(y, 0.0) + _power(at_most(y, 0.0) * f32(_LOG2E))
                if seen is not None:
                    value = tirx.Select(seen(token), value, f32(0.0))
                T.buffer_store(out, value, [i, d])

            vectors(self.D, self.lanes, put)
            if self.width > self.D:
                with T.serial(self.D, self.width) as d:
                    T.buffer_store(out, f32(0.0), [i, d])


class Pair(Rows):
    """[softmax(y), softmax(-y)] of y = scale x w, each half padded to whole vectors.

    Both exponentials come from one range reduction: y log2(e) = n + r gives 2^n p(r) and
    2^-n p(-r), and p(-r) shares its powers with p(r). No extreme is subtracted as long as every
    number is within 100 of zero, which shows in the sums; a row for which that fails is done
    again with its extremes.
    """

    def __init__(self, x: Any, w: Any, scale: float, lanes: int, height: int) -> None:
        super().__init__(x, lanes, height)
        self.w, self.scale, self.R = w, scale, int(w.shape[2])
        self.half = up(self.R, max(lanes, ROWS))
        self.width = 2 * self.half

    def pack(self) -> None:
        """Columns of w scale log2(e) in panels of two vectors; columns after the last are zero."""
        self.columns = panels(self.half, self.lanes)
        self.wp = scratch(self.H, len(self.columns), self.D, 2 * self.lanes)
        factor = self.scale * _LOG2E
        with T.parallel(0, self.H * self.D) as n:
            h, d = n // self.D, n % self.D
            for at, (r0, width) in enumerate(self.columns):
                whole = max(min(width, self.R - r0), 0)

                def put(r: Any, at: int = at, r0: int = r0) -> None:
                    value = load(self.w, h, d, r0 + r) * f32(factor)
                    T.buffer_store(self.wp, value, [h, at, d, r])

                vectors(whole, self.lanes, put)
                if whole < width:
                    with T.serial(whole, width) as r:
                        T.buffer_store(self.wp, f32(0.0), [h, at, d, r])

    def block(self, b: Any, h: Any, first: Any, tiles: Any, out: Any, seen: Seen | None) -> None:
        """See `Rows`."""
        with T.serial(0, tiles) as t:
            z = scratch(self.rows, self.half)
            row = t * self.rows
            with T.serial(0, self.rows) as i:
                self.fetch(b, h, first + row + i)
            for at, (r0, width) in enumerate(self.columns):
                tile(
                    lambda i, d: load(self.x, b, h, self.token(first + row + i), d),
                    lambda d, r, at=at: self.wp[h, at, d, r],  # type: ignore[misc]
                    self.D,
                    lambda i, r, s, r0=r0: T.buffer_store(z, s, [i, r0 + r]),  # type: ignore[misc]
                    rows=self.rows,
                    width=width,
                )
            number = power_of_two(2 * self.rows)
            total = scratch(1, number)
            self._exponentials(z, out, row, total)
            large = self._large(total, number)
            with T.If(large > f32(0.0)), T.Then(), T.serial(0, self.rows) as i:
                self._by_extremes(z, i, out, row + i, total)
            step = min(number, self.lanes)
            for n in range(0, number, step):
                value = all_lanes(1.0, step) / whole(total, 0, lanes=step, start=n)
                put(total, value, 0, lanes=step, start=n)
            with T.serial(0, self.rows) as i:
                self._normalise(out, row + i, total, i, seen and seen(first + row + i))

    def _exponentials(self, z: Any, out: Any, row: Any, total: Any) -> None:
        """Both exponentials of a tile, and total[0, 2 i + side] their sums."""
        lanes, vectors_ = self.lanes, self.half // self.lanes
        acc = scratch(2 * self.rows, lanes)
        with T.serial(0, self.rows) as i:
            for o in range(vectors_):
                with T.vectorized(0, lanes) as x:
                    j = o * lanes + x
                    for side, value in enumerate(_both(z[i, j])):
                        at = [row + i, side * self.half + j]
                        T.buffer_store(out, self._real(o, x, value), at)
            for side in (0, 1):
                start = side * self.half
                with T.vectorized(0, lanes) as x:
                    value = out[row + i, start + x]
                    for o in range(1, vectors_):
                        value = value + out[row + i, start + o * lanes + x]
                    T.buffer_store(acc, value, [2 * i + side, x])
        row_sums(acc, 2 * self.rows, lanes, total, 0)

    def _large(self, total: Any, number: int) -> Any:
        """How many sums say that numbers were too far from zero. NaN is none: it is kept anyway."""
        step, found = min(number, self.lanes), f32(0.0)
        for n in range(0, number, step):
            large = whole(total, 0, lanes=step, start=n) > all_lanes(_SAFE, step)
            flags = tirx.Select(large, all_lanes(1.0, step), all_lanes(0.0, step))
            found = found + sums([flags], step)
        return found

    def _normalise(self, out: Any, at: Any, total: Any, i: Any, seen: Any) -> None:
        for side in (0, 1):
            for o in range(self.half // self.lanes):
                with T.vectorized(0, self.lanes) as x:
                    j = side * self.half + o * self.lanes + x
                    value = out[at, j] * total[0, 2 * i + side]
                    if seen is not None:  # also where the feature is NaN
                        value = tirx.Select(seen, value, f32(0.0))
                    T.buffer_store(out, value, [at, j])

    def _real(self, o: int, x: Any, value: Any) -> Any:
        """Zero where a lane of vector o is padding."""
        if (o + 1) * self.lanes <= self.R:
            return value
        return tirx.Select(o * self.lanes + x < self.R, value, f32(0.0))

    def _by_extremes(self, z: Any, i: Any, out: Any, at: Any, total: Any) -> None:
        """Unnormalised exponentials and sums of one row, for numbers of any size."""
        for side, op, first in ((0, tirx.max, MINIMUM), (1, tirx.min, -MINIMUM)):
            edge = scratch(1, 1)
            peak = reduce_row(self.R, self.lanes, lambda j: z[i, j], op, first)
            T.buffer_store(edge, peak, [0, 0])
            start = side * self.half

            def put(j: Any, side: int = side, start: int = start, edge: Any = edge) -> None:
                below = edge[0, 0] - z[i, j] if side else z[i, j] - edge[0, 0]
                T.buffer_store(out, _power(below), [at, start + j])

            vectors(self.R, self.lanes, put)
            value = lambda j, start=start: out[at, start + j]  # noqa: E731
            z_sum = reduce_row(self.R, self.lanes, value, lambda a, b: a + b, 0.0)
            T.buffer_store(total, z_sum, [0, 2 * i + side])


def _horner(x: Any, coefficients: list[float]) -> Any:
    y = f32(coefficients[0])
    for c in coefficients[1:]:
        y = y * x + f32(c)
    return y


def _parts(z: Any, body: Callable[[Any, Any], Any]) -> Any:
    """body(the bits of 2^n, r) with z = n + r, |r| <= 1/2, |z| < 2^22."""

    def of(t: Any) -> Any:
        r = z - (tirx.reinterpret("float32", t) - f32(_SHIFT))
        return _let("r", r, lambda r: body(t << tirx.const(23, "int32"), r))

    # As an integer in between, or TVM's simplifier would cancel adding and subtracting the shift.
    return _let("t", tirx.reinterpret("int32", z + f32(_SHIFT)), of)


def _both(z: Any) -> tuple[Any, Any]:
    """2^z and 2^-z for |z| <= 126 (clamped to it)."""

    def value(side: int, bits: Any, r: Any) -> Any:
        def of(r2: Any) -> Any:
            even, odd = _horner(r2, _EVEN), r * _horner(r2, _ODD)
            other = tirx.const(254 << 23, "int32") - bits
            power = tirx.reinterpret("float32", other if side else bits)
            return (even - odd if side else even + odd) * power

        return _let("r2", r * r, of)

    def one(side: int) -> Any:
        clamped = at_most(at_least(z, -_CLAMP), _CLAMP)
        return _let("c", clamped, lambda c: _parts(c, lambda bits, r: value(side, bits, r)))

    return one(0), one(1)


def _let(name: str, value: Any, body: Callable[[Any], Any]) -> Any:
    """body(value), the value computed once: expressions that share parts grow too fast."""
    var = tirx.Var(name, str(value.ty.dtype) if hasattr(value, "ty") else value.dtype)
    return tirx.Let(var, value, body(var))


def _power(z: Any) -> Any:
    """2^z for z <= 0; 0 below -127."""

    def value(bits: Any, r: Any) -> Any:
        p = _let("r2", r * r, lambda r2: _horner(r2, _EVEN) + r * _horner(r2, _ODD))
        return p * tirx.reinterpret("float32", bits)

    return _let("c", at_least(z, -127.0), lambda c: _parts(c, value))
