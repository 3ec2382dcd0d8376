"""Scheduling of data-parallel blocks."""

from __future__ import annotations

from typing import Any

import tvm_ffi

from codegen.schedules._common import SMALL, extent, fuse_all, parallel_chunks, size, vector_split
from codegen.target import Target


def spread(sch: Any, block: Any, target: Target) -> None:
    """Parallel over the outer loops, vectors along the last; serial when small."""
    loops = list(sch.get_loops(block))
    if not loops:
        return
    parallel = size(sch, loops) >= SMALL
    if len(loops) > 1 and _flat(sch, block):
        loops = [fuse_all(sch, loops)]
    if len(loops) == 1:
        _one_loop(sch, loops[0], parallel, target)
        return
    vector_split(sch, loops[-1], target.lanes)
    if parallel:
        parallel_chunks(sch, loops[:-1], target)


def _one_loop(sch: Any, loop: Any, parallel: bool, target: Target) -> None:
    total = extent(sch, loop)
    width = next((w for w in (target.lanes, target.lanes // 2) if w and total % w == 0), 1)
    chunks, inner = sch.split(loop, [None, width])
    if width > 1:
        sch.vectorize(inner)
    if parallel:
        parallel_chunks(sch, [chunks], target)


def _flat(sch: Any, block: Any) -> bool:
    """Whether every access of the block is at its own axes in order (so loops may be fused)."""
    stmt = sch.get(block)
    axes = [v.var for v in stmt.iter_vars]
    shape = [int(v.dom.extent) for v in stmt.iter_vars]
    return all(_straight(r, axes, shape) for r in (*stmt.reads, *stmt.writes))


def _straight(access: Any, axes: list[Any], shape: list[int]) -> bool:
    buffer = access.source
    if len(buffer.shape) == 0:
        return True
    if [int(d) for d in buffer.shape] != shape:
        return False
    return all(
        tvm_ffi.structural_equal(r.min, axis) for r, axis in zip(access.region, axes, strict=True)
    )
