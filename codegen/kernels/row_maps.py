"""Definitions of maps of rows around an attention (plain TE, counted, not run as they are).

Blocks start with ``rmap_``; the rule ``row_map`` (codegen/schedules/row_maps.py) writes the same
rows with vectors. Values are float32 in between.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from codegen.kernels.attention import arranged, broadcast, wide
from codegen.kernels.vector_math import f32


def _read(x: Any) -> Any:
    dtype = str(x.dtype)
    return lambda *i: wide(x(*i), dtype)


def gate(gain: float, x: Any, q: Any, w: Any, b: Any, *, tokens_first: bool = False) -> Any:
    """x gain / (1 + exp(-(q.w + b))): x [B, H, T, E], q [B, H, T, D], w [H, D], b [H, 1].

    The result is [B, T, H * E] with `tokens_first`.
    """
    d_, rows, dtype = int(q.shape[3]), [int(n) for n in q.shape[:3]], str(x.dtype)
    d, query, value = te.reduce_axis((0, d_), name="d"), _read(q), _read(x)
    dot = te.compute(
        rows, lambda *i: te.sum(query(*i, d) * wide(w[i[1], d], str(w.dtype)), axis=d),
        name="rmap_dot",
    )  # fmt: skip
    factor = te.compute(
        rows,
        lambda *i: tirx.sigmoid(dot(*i) + wide(b[i[1], 0], str(b.dtype))) * f32(gain),
        name="rmap_gate",
    )
    return arranged(
        tuple(int(n) for n in x.shape),
        lambda n, h, i, e: (value(n, h, i, e) * factor[n, h, i]).astype(dtype),
        "rmap_gated",
        tokens_first,
    )


def scale_channels(x: Any, g: Any, *mask: Any) -> Any:
    """x [B, G, S, E] times g [B, H, 1, E]: [B, H, S, E], 0 where mask [B or 1, S] hides."""
    b_, h_, _, e_ = (int(n) for n in g.shape)
    tokens, group = int(x.shape[2]), h_ // int(x.shape[1])
    value, factor, dtype = _read(x), _read(g), str(x.dtype)

    def one(b: Any, h: Any, i: Any, e: Any) -> Any:
        product = value(b, h // group, i, e) * factor(b, h, 0, e)
        if mask:
            product = tirx.Select(broadcast(mask[0], (b, i)), product, f32(0.0))
        return product.astype(dtype)

    return te.compute((b_, h_, tokens, e_), one, name="rmap_channels")


def add_rows(x: Any, q: Any, *share: Any, tokens_first: bool = False) -> Any:
    """x + q, or x + q share with share [B, H, 1, 1]: x, q [B, H, T, E].

    The result is [B, T, H * E] with `tokens_first`.
    """
    value, other, dtype = _read(x), _read(q), str(x.dtype)

    def one(b: Any, h: Any, i: Any, e: Any) -> Any:
        added = other(b, h, i, e)
        if share:
            added = added * _read(share[0])(b, h, 0, 0)
        return (value(b, h, i, e) + added).astype(dtype)

    return arranged(tuple(int(n) for n in x.shape), one, "rmap_added", tokens_first)


def ratio(least: float, x: Any, last: Any, *, tokens_first: bool = False) -> Any:
    """x [B, H, T, E] over the largest of last [B, H, T, 2] and least.

    The result is [B, T, H * E] with `tokens_first`.
    """
    value, below, dtype = _read(x), _read(last), str(x.dtype)
    factor = te.compute(
        [int(n) for n in x.shape[:3]],
        lambda *i: f32(1.0) / tirx.max(tirx.max(below(*i, 0), below(*i, 1)), f32(least)),
        name="rmap_factor",
    )
    return arranged(
        tuple(int(n) for n in x.shape),
        lambda n, h, i, e: (value(n, h, i, e) * factor[n, h, i]).astype(dtype),
        "rmap_ratio",
        tokens_first,
    )


def extend(factor: float, one: bool, x: Any) -> Any:
    """[x, factor |x|^2] or, with `one`, [x, factor |x|^2, 1]: [B, H, T, D + 1 or 2]."""
    *lead, d_ = (int(n) for n in x.shape)
    a, read, dtype = te.reduce_axis((0, d_), name="a"), _read(x), str(x.dtype)
    square = te.compute(lead, lambda *i: te.sum(read(*i, a) * read(*i, a), axis=a), name="rmap_sq")
    part = te.compute(lead, lambda *i: square(*i) * f32(factor), name="rmap_part")

    def value(*i: Any) -> Any:
        own = read(*i[:-1], tirx.min(i[-1], d_ - 1))
        last = tirx.if_then_else(i[-1] == d_, part(*i[:-1]), f32(1.0))
        return tirx.if_then_else(i[-1] < d_, own, last).astype(dtype)

    return te.compute((*lead, d_ + 1 + int(one)), value, name="rmap_extend")


def mixture(inverse: float, key_norm: bool, k: Any, shift: Any, rate: Any, mix: Any) -> Any:
    """The keys of a mixture of Gaussians, side by side: k [B, G, S, D] -> [B, G, S, M (D + 2)].

    shift [G, M, D], rate and mix [G, M]. Part r is [c y, c, c (n - |y|^2) / 2 + mix inverse] with
    y = k + shift, c = exp(rate) and n = |k|^2 with `key_norm`, else 0.
    """
    *lead, d_ = (int(n) for n in k.shape)
    g_, m_, read, dtype = lead[1], int(shift.shape[1]), _read(k), str(k.dtype)
    a, b = te.reduce_axis((0, d_), name="a"), te.reduce_axis((0, d_), name="b")
    move, log_rate, log_mix = (_read(x) for x in (shift, rate, mix))
    c = te.compute((g_, m_), lambda g, r: tirx.exp(log_rate(g, r)), name="rmap_rate")
    offset = te.compute((g_, m_), lambda g, r: log_mix(g, r) * f32(inverse), name="rmap_mix")
    y = te.compute(
        (*lead, m_, d_), lambda n, g, j, r, d: read(n, g, j, d) + move(g, r, d), name="rmap_moved"
    )
    far = te.compute(
        (*lead, m_), lambda *i: te.sum(y(*i, a) * y(*i, a), axis=a), name="rmap_square"
    )
    if key_norm:
        own = te.compute(
            lead, lambda *i: te.sum(read(*i, b) * read(*i, b), axis=b), name="rmap_own"
        )
        gap = te.compute((*lead, m_), lambda *i: own(*i[:3]) - far(*i), name="rmap_gap")
        half = te.compute((*lead, m_), lambda *i: gap(*i) * f32(0.5), name="rmap_half")
    else:
        half = te.compute((*lead, m_), lambda *i: far(*i) * f32(-0.5), name="rmap_half")
    size = te.compute(
        (*lead, m_), lambda n, g, j, r: half(n, g, j, r) * c[g, r] + offset[g, r], name="rmap_size"
    )
    scaled = te.compute(
        (*lead, m_, d_), lambda n, g, j, r, d: y[n, g, j, r, d] * c[g, r], name="rmap_scaled"
    )

    def value(n: Any, g: Any, j: Any, x: Any) -> Any:
        r, d = x // (d_ + 2), x % (d_ + 2)
        last = tirx.if_then_else(d == d_, c[g, r], size[n, g, j, r])
        inner = scaled[n, g, j, r, tirx.min(d, d_ - 1)]
        return tirx.if_then_else(d < d_, inner, last).astype(dtype)

    return te.compute((*lead, m_ * (d_ + 2)), value, name="rmap_mixture")
