"""Definitions of feature maps: projection, softmax pair, elu + 1 (plain TE, counted, not run).

Blocks start with ``proj_``, ``pair_`` and ``elu1``.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from codegen.kernels.attention import wide
from codegen.kernels.vector_math import f32


def project(scale: float, x: Any, w: Any, result: str = "") -> Any:
    """x [B, H, T, D] times w [H, D, R] times scale: [B, H, T, R] in x's dtype, or in `result`."""
    b_, h_, t_, d_ = (int(n) for n in x.shape)
    d = te.reduce_axis((0, d_), name="d")
    dtype, shape = str(x.dtype), (b_, h_, t_, int(w.shape[2]))
    y = te.compute(
        shape,
        lambda b, h, i, r: te.sum(
            wide(x[b, h, i, d], dtype) * wide(w[h, d, r], str(w.dtype)), axis=d
        ),
        name="proj_sum",
    )
    factor = f32(scale)
    return te.compute(
        shape,
        lambda *i: (y(*i) * factor if scale != 1.0 else y(*i)).astype(result or dtype),
        name="proj_out",
    )


def softmax_pair(y: Any) -> Any:
    """[softmax(y), softmax(-y)] over the last axis: [..., R] -> [..., 2 R]."""
    *lead, r_ = (int(n) for n in y.shape)
    dtype = str(y.dtype)
    a, b, c, d = (te.reduce_axis((0, r_), name=n) for n in "abcd")
    x = te.compute(y.shape, lambda *i: wide(y(*i), dtype), name="pair_wide")
    hi = te.compute(lead, lambda *i: te.max(x(*i, a), axis=a), name="pair_max")
    lo = te.compute(lead, lambda *i: te.min(x(*i, b), axis=b), name="pair_min")
    up = te.compute(y.shape, lambda *i: tirx.exp(x(*i) - hi(*i[:-1])), name="pair_exp")
    down = te.compute(y.shape, lambda *i: tirx.exp(lo(*i[:-1]) - x(*i)), name="pair_exp_minus")
    zu = te.compute(lead, lambda *i: te.sum(up(*i, c), axis=c), name="pair_sum")
    zd = te.compute(lead, lambda *i: te.sum(down(*i, d), axis=d), name="pair_sum_minus")
    pu = te.compute(y.shape, lambda *i: up(*i) / zu(*i[:-1]), name="pair_up")
    pd = te.compute(y.shape, lambda *i: down(*i) / zd(*i[:-1]), name="pair_down")
    return te.compute(
        (*lead, 2 * r_),
        lambda *i: tirx.if_then_else(
            i[-1] < r_, pu(*i[:-1], i[-1]), pd(*i[:-1], i[-1] - r_)
        ).astype(dtype),
        name="pair_out",
    )


def elu1(x: Any, result: str = "") -> Any:
    """elu(x) + 1 = max(x, 0) + exp(min(x, 0)) of every element, in x's dtype or in `result`."""
    dtype, zero = str(x.dtype), f32(0.0)

    def value(*i: Any) -> Any:
        y = wide(x(*i), dtype)
        return (tirx.max(y, zero) + tirx.exp(tirx.min(y, zero))).astype(result or dtype)

    return te.compute(x.shape, value, name="elu1")
