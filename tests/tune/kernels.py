"""One dense kernel and traces of it: right and slow, and quietly wrong."""

from __future__ import annotations

import functools
from typing import Any

import tvm
import tvm.s_tir as st
from tvm import te

from codegen.kernels.dense import dense, panel_width
from codegen.target import target_named
from codegen.tune_space import trace_json, workload

ROWS, DEPTH, COLUMNS = 24, 160, 64


@functools.cache
def product() -> Any:
    """x [24, 160] times packed weights -> [24, 64]."""
    x = te.placeholder((ROWS, DEPTH), name="x")
    target = target_named("cpu")
    width = panel_width(target)
    panels = te.placeholder((COLUMNS // width, DEPTH, width), name="w")
    out = dense(x, panels, COLUMNS, target)
    return te.create_prim_func([x, panels, out]).without_attr("global_symbol")


def product_json() -> str:
    return str(tvm.ir.save_json(product()))


def naive_trace() -> Any:
    """Finds a block and leaves the loops as they are."""
    sch = st.Schedule(workload(product()))
    sch.get_sblock("dense")
    return trace_json(sch)


def half_precision_trace() -> Any:
    """Sums in float16: a legal trace whose outputs are wrong in float32."""
    sch = st.Schedule(workload(product()))
    sch.unsafe_set_dtype(sch.cache_write(sch.get_sblock("dense"), 0, "global"), 0, "float32")
    sch.unsafe_set_dtype(sch.get_sblock("dense"), 0, "float16")
    return trace_json(sch)
