"""A scheduled GPU kernel as plain serial loops, run on the CPU.

This proves what the schedule computes, before TVM lowers threads: bound loops become serial and
shared memory becomes plain memory. Barriers and shuffles are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from codegen.lower import Lowered


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


def bound_loops(func: Any) -> list[tuple[str, int]]:
    """(thread tag, extent) of every bound loop of a scheduled kernel."""
    return list(_bound(func.body))


def _bound(stmt: Any) -> Iterator[tuple[str, int]]:
    if isinstance(stmt, tirx.For):
        if stmt.kind == tirx.ForKind.THREAD_BINDING:
            yield str(stmt.thread_binding.thread_tag), int(stmt.extent)
        yield from _bound(stmt.body)
    elif isinstance(stmt, tirx.SeqStmt):
        for part in stmt.seq:
            yield from _bound(part)
    elif isinstance(stmt, SBlockRealize):
        yield from _bound(stmt.block.body)


def module_as_loops(lowered: Lowered) -> Lowered:
    """The whole lowered model with serial kernels: its shape for the CPU."""
    mod = lowered.mod.clone()
    for gv, func in list(mod.functions_items()):
        if isinstance(func, tirx.PrimFunc):
            mod.update_func(gv, as_loops(func))
    return replace(lowered, mod=mod)
