"""Definition of small Gaussian systems solved by Newton's iteration; counted, never run as it is.

Letters as in passes/site.py; m landmarks x. The schedule is codegen/schedules/newton.py.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.landmarks import _Square, one_of
from codegen.kernels.tiles import load, store
from codegen.kernels.vector_math import f32

GUARD = 0.01


def lift(k: Any, *rest: Any) -> None:
    """[k, 1, -h], h half the largest squared length of a visible key: [B, G, S, D + 2]."""
    mask, out = (rest[0] if len(rest) == 2 else None), rest[-1]
    b_, g_, s_, d_ = (int(n) for n in k.shape)
    square, peak = _new(1), _new(1)
    with T.grid(b_, g_) as (b, g):
        T.buffer_store(peak, f32(0.0), [0])
        with T.serial(0, s_) as j:
            T.buffer_store(square, f32(0.0), [0])
            with T.serial(0, d_) as d:
                value = load(k, b, g, j, d) * load(k, b, g, j, d)
                T.buffer_store(square, square[0] + value, [0])
                store(out, [b, g, j, d], load(k, b, g, j, d))
            value = square[0]
            if mask is not None:
                value = tirx.Select(one_of(mask, b, j), value, f32(0.0))
            T.buffer_store(peak, tirx.max(peak[0], value), [0])
        T.buffer_store(peak, peak[0] * f32(-0.5), [0])
        with T.serial(0, s_) as j:
            store(out, [b, g, j, d_], f32(1.0))
            store(out, [b, g, j, d_ + 1], peak[0])


def solve(scale: float, ridge: float, steps: int, x: Any, n: Any, *rest: Any) -> None:
    """U = (A + ridge I)^-1 n, A = exp(-scale |x_i - x_j|^2 / 2), then GUARD |U|, last channel.

    x [B, G, m, D], n [B, G, m, W], perhaps a bool mask [B or 1, m] of landmarks (the others are a
    system of their own, of the identity): [B, G, m, W + 1]. With r the root of one over the row
    sums of P = A + ridge I, r P r has eigenvalues up to 1, and V <- V (2 I - r P r V) from I tends
    to its inverse.
    """
    mask, out = (rest[0] if len(rest) == 2 else None), rest[-1]
    b_, g_, m_, _ = (int(v) for v in x.shape)
    w_, on = int(n.shape[3]), _Square(m_)
    p, v, y, z = (on.new() for _ in range(4))
    right, root = T.sblock_alloc_buffer((m_, w_), "float32"), _new(m_)
    with T.grid(b_, g_) as (b, g):
        _system(scale, ridge, x, mask, (p, root), (b, g))
        with T.grid(m_, m_) as (i, j):
            T.buffer_store(p, p[i, j] * root[i] * root[j], [i, j])
            T.buffer_store(v, tirx.if_then_else(i == j, f32(1.0), f32(0.0)), [i, j])
        with T.serial(0, steps):
            on.product(p, v, y)
            on.less(2.0, y, z)
            on.product(v, z, y)
            with T.grid(m_, m_) as (i, j):
                T.buffer_store(v, y[i, j], [i, j])
        with T.grid(m_, w_) as (i, e):
            T.buffer_store(right, n[b, g, i, e] * root[i], [i, e])
        with T.grid(m_, w_) as (i, e):
            T.buffer_store(out, f32(0.0), [b, g, i, e])
            with T.serial(0, m_) as j:
                T.buffer_store(out, out[b, g, i, e] + v[i, j] * right[j, e], [b, g, i, e])
            T.buffer_store(out, out[b, g, i, e] * root[i], [b, g, i, e])
        with T.serial(0, m_) as i:
            T.buffer_store(out, tirx.abs(out[b, g, i, w_ - 1]) * f32(GUARD), [b, g, i, w_])


def _system(
    scale: float, ridge: float, x: Any, mask: Any, into: tuple[Any, Any], at: tuple[Any, Any]
) -> None:
    """p = A + ridge I, and the roots of one over its row sums."""
    (p, root), (b, g), (m_, d_) = into, at, (int(v) for v in x.shape[2:])
    half, dot = _new(m_), _new(1)
    with T.serial(0, m_) as i:
        T.buffer_store(half, f32(0.0), [i])
        with T.serial(0, d_) as d:
            T.buffer_store(half, half[i] + x[b, g, i, d] * x[b, g, i, d], [i])
        T.buffer_store(half, half[i] * f32(0.5), [i])
    with T.serial(0, m_) as i:
        with T.serial(0, m_) as j:
            T.buffer_store(dot, f32(0.0), [0])
            with T.serial(0, d_) as d:
                T.buffer_store(dot, dot[0] + x[b, g, i, d] * x[b, g, j, d], [0])
            value = tirx.exp((dot[0] - half[i] - half[j]) * f32(scale))
            if mask is not None:
                both = tirx.all(one_of(mask, b, i), one_of(mask, b, j))
                value = tirx.Select(both, value, f32(0.0))
            T.buffer_store(p, value, [i, j])
        more = f32(ridge)
        if mask is not None:
            more = tirx.Select(one_of(mask, b, i), more, f32(1.0))
        T.buffer_store(p, p[i, i] + more, [i, i])
        T.buffer_store(root, f32(0.0), [i])
        with T.serial(0, m_) as j:
            T.buffer_store(root, root[i] + p[i, j], [i])
        T.buffer_store(root, f32(1.0) / tirx.sqrt(root[i]), [i])


def _new(n: int) -> Any:
    return T.sblock_alloc_buffer((n,), "float32")
