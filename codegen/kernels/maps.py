"""Definitions of the feature maps of the kernelised forms (plain TE, counted, not run as they are).

All work row by row on the last axis. Blocks start with ``map_``; the rule ``map``
(codegen/schedules/maps.py) writes the same rows with vectors. Values are float32 in between.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import te, tirx

from codegen.kernels.attention import arranged, wide
from codegen.kernels.vector_math import f32

HIGHEST = 60.0  # exponents above it would overflow in the sums over tokens
HALF_ROOT = math.sqrt(0.5)
HUGE = 2.0**60  # a denominator that no sum of features reaches, and exact to divide by


def _read(x: Any) -> Any:
    dtype = str(x.dtype)
    return lambda *i: wide(x(*i), dtype)


def relu(floor: float, x: Any) -> Any:
    """max(x, 0) + floor of every element."""
    read, dtype = _read(x), str(x.dtype)
    return te.compute(
        x.shape,
        lambda *i: (tirx.max(read(*i), f32(0.0)) + f32(floor)).astype(dtype),
        name="map_relu",
    )


def cosine(floor: float, x: Any, table: Any) -> Any:
    """[r sin, r cos] with r = max(x, 0) + floor: x [B, H, T, D], table [T, 2] -> [B, H, T, 2 D]."""
    *lead, d_ = (int(n) for n in x.shape)
    read, dtype = _read(x), str(x.dtype)
    r = te.compute(
        x.shape, lambda *i: tirx.max(read(*i), f32(0.0)) + f32(floor), name="map_positive"
    )
    return te.compute(
        (*lead, 2 * d_),
        lambda b, h, i, c: (r[b, h, i, c % d_] * table[i, c // d_]).astype(dtype),
        name="map_cosine",
    )


def exp_query(y: Any, offset: Any = None) -> Any:
    """exp(y + offset - max over the row): y [B, H, T, R], offset [W, R] with W dividing H."""
    *lead, r_ = (int(n) for n in y.shape)
    read, dtype = _read(y), str(y.dtype)
    if offset is not None:
        share, inner = lead[1] // int(offset.shape[0]), read
        moved = te.compute(
            y.shape,
            lambda b, h, i, r: inner(b, h, i, r) + wide(offset[h // share, r], str(offset.dtype)),
            name="map_moved",
        )
        read = _read(moved)
    a = te.reduce_axis((0, r_), name="a")
    top = te.compute(lead, lambda *i: te.max(read(*i, a), axis=a), name="map_max")
    return te.compute(
        y.shape,
        lambda *i: tirx.exp(read(*i) - top(*i[:-1])).astype(dtype),
        name="map_exp_query",
    )


def exp_key(scale: float, floor: float, y: Any, x: Any) -> Any:
    """exp(min(y - scale |x|^2 / 2, HIGHEST)) + floor: y [B, G, S, R], x [B, G, S, D]."""
    *lead, d_ = (int(n) for n in x.shape)
    read, known, dtype = _read(y), _read(x), str(y.dtype)
    a = te.reduce_axis((0, d_), name="a")
    size = te.compute(
        lead, lambda *i: te.sum(known(*i, a) * known(*i, a), axis=a), name="map_square"
    )
    half = te.compute(lead, lambda *i: size(*i) * f32(0.5 * scale), name="map_half")
    return te.compute(
        y.shape,
        lambda *i: (tirx.exp(tirx.min(read(*i) - half(*i[:-1]), f32(HIGHEST))) + f32(floor)).astype(
            dtype
        ),
        name="map_exp_key",
    )


def polynomial(low: bool, flat: float, y: Any) -> Any:
    """[flat, y, pairs] (`low`) or [flat, pairs]: y [..., d] -> [..., 1 (+ d) + d (d + 1) / 2].

    Pair s d + a is y_a y_{(a + s) mod d}, for s = 0 times sqrt(1/2): the product of two rows of
    pairs is (y . y')^2 / 2.
    """
    *lead, d_ = (int(n) for n in y.shape)
    read, dtype = _read(y), str(y.dtype)
    pairs, first = d_ * (d_ + 1) // 2, 1 + d_ if low else 1
    product = te.compute(
        (*lead, pairs),
        lambda *i: read(*i[:-1], i[-1] % d_) * read(*i[:-1], (i[-1] % d_ + i[-1] // d_) % d_),
        name="map_product",
    )
    square = te.compute((*lead, d_), lambda *i: product(*i) * f32(HALF_ROOT), name="map_half")

    def value(*i: Any) -> Any:
        at, p = i[:-1], tirx.max(i[-1] - first, 0)
        even = tirx.if_then_else(p < d_, square(*at, tirx.min(p, d_ - 1)), product(*at, p))
        if low:
            line = read(*at, tirx.min(tirx.max(i[-1] - 1, 0), d_ - 1))
            even = tirx.if_then_else(i[-1] < first, line, even)
        return tirx.if_then_else(i[-1] == 0, f32(flat), even).astype(dtype)

    return te.compute((*lead, first + pairs), value, name="map_polynomial")


def head_norm(eps: float, x: Any, gamma: Any, beta: Any) -> Any:
    """Layer norm over the last axis, then gamma and beta [W, X] of the head (W divides H)."""
    *lead, d_ = (int(n) for n in x.shape)
    read, dtype = _read(x), str(x.dtype)
    share = lead[1] // int(gamma.shape[0])
    a, b = te.reduce_axis((0, d_), name="a"), te.reduce_axis((0, d_), name="b")
    total = te.compute(lead, lambda *i: te.sum(read(*i, a), axis=a), name="map_sum")
    mean = te.compute(lead, lambda *i: total(*i) * f32(1.0 / d_), name="map_mean")
    apart = te.compute(x.shape, lambda *i: read(*i) - mean(*i[:-1]), name="map_apart")
    squares = te.compute(
        lead, lambda *i: te.sum(apart(*i, b) * apart(*i, b), axis=b), name="map_square"
    )
    factor = te.compute(
        lead,
        lambda *i: f32(1.0) / tirx.sqrt(squares(*i) * f32(1.0 / d_) + f32(eps)),
        name="map_factor",
    )
    return te.compute(
        x.shape,
        lambda *i: (
            apart(*i) * factor(*i[:-1]) * _read(gamma)(i[1] // share, i[-1])
            + _read(beta)(i[1] // share, i[-1])
        ).astype(dtype),
        name="map_head_norm",
    )


def glu(a: Any, b: Any) -> Any:
    """a / (1 + exp(-b)) of every element."""
    first, second, dtype = _read(a), _read(b), str(a.dtype)
    return te.compute(
        a.shape, lambda *i: (first(*i) * tirx.sigmoid(second(*i))).astype(dtype), name="map_glu"
    )


def divide(tiny: float, x: Any, count: Any, *, tokens_first: bool = False) -> Any:
    """x / max(count, tiny): x [B, H, T, E], count [B or 1, 1, T, 1].

    The result is [B, T, H * E] with `tokens_first`.
    """
    rows, dtype = [int(n) for n in count.shape], str(x.dtype)
    safe = te.compute(
        count.shape, lambda *i: tirx.max(_read(count)(*i), f32(tiny)), name="map_safe"
    )
    return arranged(
        tuple(int(n) for n in x.shape),
        lambda b, h, i, e: (
            wide(x[b, h, i, e], dtype) / safe[0 if rows[0] == 1 else b, 0, i, 0]
        ).astype(dtype),
        "map_divide",
        tokens_first,
    )


def token_norm(scale: float, eps: float, x: Any, *, tokens_first: bool = False) -> Any:
    """y / sqrt(mean of y^2 over heads and channels + eps), y = x scale: [B, H, T, E].

    The result is [B, T, H * E] with `tokens_first`.
    """
    b_, h_, t_, e_ = (int(n) for n in x.shape)
    dtype, read = str(x.dtype), _read(x)
    h0, e0 = te.reduce_axis((0, h_), name="h0"), te.reduce_axis((0, e_), name="e0")
    y = te.compute(x.shape, lambda *i: read(*i) * f32(scale), name="map_scaled")
    squares = te.compute(
        (b_, t_),
        lambda b, i: te.sum(y[b, h0, i, e0] * y[b, h0, i, e0], axis=[h0, e0]),
        name="map_square",
    )
    factor = te.compute(
        (b_, t_),
        lambda b, i: f32(1.0) / tirx.sqrt(squares[b, i] * f32(1.0 / (h_ * e_)) + f32(eps)),
        name="map_factor",
    )
    return arranged(
        (b_, h_, t_, e_),
        lambda b, h, i, e: (y[b, h, i, e] * factor[b, i]).astype(dtype),
        "map_token_norm",
        tokens_first,
    )
