"""A scheduled GPU kernel as plain serial loops, run on the CPU.

This proves what the schedule computes, before TVM lowers threads: bound loops become serial and
shared memory becomes plain memory. Barriers and shuffles are not part of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize


def as_loops(func: Any) -> Any:
    """`func` with every thread-bound loop serial."""
    return func.with_body(_serial(func.body))


def _serial(stmt: Any) -> Any:
    if isinstance(stmt, tirx.For):
        bound = stmt.kind == tirx.ForKind.THREAD_BINDING
        kind = tirx.ForKind.SERIAL if bound else tirx.ForKind(stmt.kind)
        return tirx.For(stmt.loop_var, stmt.min, stmt.extent, kind, _serial(stmt.body))
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([_serial(s) for s in stmt.seq])
    if isinstance(stmt, SBlockRealize):
        return SBlockRealize(stmt.iter_values, stmt.predicate, _serial(stmt.block))
    if isinstance(stmt, SBlock):
        return SBlock(
            stmt.iter_vars,
            stmt.reads,
            stmt.writes,
            stmt.name_hint,
            _serial(stmt.body),
            stmt.init,
            stmt.alloc_buffers,
            stmt.match_buffers,
        )
    return stmt


def run_loops(func: Any, *arrays: np.ndarray) -> np.ndarray:
    """The last parameter's values after a run on `arrays`; it starts as NaN (or all ones)."""
    out = func.params[-1]
    shape, dtype = [int(n) for n in out.shape], str(out.dtype)
    made = np.full(shape, np.nan if dtype.startswith("float") else 1, dtype)
    plain = as_loops(func).with_attr("global_symbol", "main").without_attr("tirx.is_scheduled")
    library = tvm.compile(plain, target="llvm")
    tensors = [tvm.runtime.tensor(a) for a in (*arrays, made)]
    library["main"](*tensors)
    result: np.ndarray = tensors[-1].numpy()
    return result
