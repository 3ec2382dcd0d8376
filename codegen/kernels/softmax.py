"""Softmax and log-softmax along the last axis."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from codegen.kernels.rows import MAX, SUM, row_reduce
from codegen.kernels.vector_math import f32, vexp


def softmax(x: Any, lanes: int) -> Any:
    """exp(x - max) / sum, x [..., N] float32. A NaN in a row makes the whole row NaN."""
    lead, width = tuple(int(d) for d in x.shape[:-1]), int(x.shape[-1])
    top = row_reduce(lead, width, lambda *i: x(*i), MAX, lanes, "rows_max")
    powers = te.compute(x.shape, lambda *i: vexp(x(*i) - top(*i[:-1])), name="rows_exp")
    total = row_reduce(lead, width, lambda *i: powers(*i), SUM, lanes, "rows_sum")
    inverse = te.compute(lead, lambda *i: f32(1.0) / total(*i), name="rows_inv")
    return te.compute(x.shape, lambda *i: powers(*i) * inverse(*i[:-1]), name="softmax")


def log_softmax(x: Any, lanes: int) -> Any:
    """x - max - log(sum(exp(x - max))), x [..., N] float32."""
    lead, width = tuple(int(d) for d in x.shape[:-1]), int(x.shape[-1])
    top = row_reduce(lead, width, lambda *i: x(*i), MAX, lanes, "rows_max")
    total = row_reduce(lead, width, lambda *i: vexp(x(*i) - top(*i[:-1])), SUM, lanes, "rows_sum")
    shift = te.compute(lead, lambda *i: top(*i) + tirx.log(total(*i)), name="rows_shift")
    return te.compute(x.shape, lambda *i: x(*i) - shift(*i[:-1]), name="softmax")
