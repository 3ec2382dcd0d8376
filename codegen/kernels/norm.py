"""Layer norm and RMS norm along the last axis (two passes over a row that stays in cache)."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from codegen.kernels.rows import SUM, row_reduce
from codegen.kernels.vector_math import f32


def layer_norm(x: Any, gamma: Any, beta: Any, eps: float, lanes: int) -> Any:
    """(x - mean) / sqrt(var + eps) * gamma + beta; x [..., N], gamma and beta [N] or None."""
    lead, width = tuple(int(d) for d in x.shape[:-1]), int(x.shape[-1])
    scale = f32(1.0 / width)
    total = row_reduce(lead, width, lambda *i: x(*i), SUM, lanes, "rows_sum")
    mean = te.compute(lead, lambda *i: total(*i) * scale, name="rows_mean")

    def deviation(*i: Any) -> Any:
        return x(*i) - mean(*i[:-1])

    squares = row_reduce(
        lead, width, lambda *i: deviation(*i) * deviation(*i), SUM, lanes, "rows_square"
    )
    inverse = te.compute(
        lead, lambda *i: f32(1.0) / tirx.sqrt(squares(*i) * scale + f32(eps)), name="rows_inv"
    )
    return te.compute(
        x.shape,
        lambda *i: _affine(deviation(*i) * inverse(*i[:-1]), gamma, beta, i[-1]),
        name="layer_norm",
    )


def rms_norm(x: Any, gamma: Any, eps: float, lanes: int) -> Any:
    """x / sqrt(mean(x * x) + eps) * gamma; x [..., N], gamma [N] or None."""
    lead, width = tuple(int(d) for d in x.shape[:-1]), int(x.shape[-1])
    squares = row_reduce(lead, width, lambda *i: x(*i) * x(*i), SUM, lanes, "rows_square")
    inverse = te.compute(
        lead,
        lambda *i: f32(1.0) / tirx.sqrt(squares(*i) * f32(1.0 / width) + f32(eps)),
        name="rows_inv",
    )
    return te.compute(
        x.shape,
        lambda *i: _affine(x(*i) * inverse(*i[:-1]), gamma, None, i[-1]),
        name="rms_norm",
    )


def _affine(value: Any, gamma: Any, beta: Any, j: Any) -> Any:
    value = value if gamma is None else value * gamma[j]
    return value if beta is None else value + beta[j]
