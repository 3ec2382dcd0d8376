"""Sum, mean, maximum and minimum along the last axis, in lanes."""

from __future__ import annotations

from typing import Any

from tvm import te

from codegen.kernels.rows import NAN_MAX, NAN_MIN, SUM, row_reduce
from codegen.kernels.vector_math import f32

REDUCERS = {"sum": SUM, "mean": SUM, "max": NAN_MAX, "min": NAN_MIN}


def row_reduction(x: Any, kind: str, keepdims: bool, lanes: int) -> Any:
    """x [..., N] float32 -> [...] (or [..., 1]); `kind` is a name in REDUCERS. NaN stays NaN."""
    lead, width = tuple(int(d) for d in x.shape[:-1]), int(x.shape[-1])
    result = row_reduce(lead, width, lambda *i: x(*i), REDUCERS[kind], lanes, f"rows_{kind}")
    scale = f32(1.0 / width)
    shape = (*lead, 1) if keepdims else lead

    def value(*i: Any) -> Any:
        r = result(*(i[:-1] if keepdims else i))
        return r * scale if kind == "mean" else r

    return te.compute(shape, value, name="row_reduction")
