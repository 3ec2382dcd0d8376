"""Scheduling of row reductions in lanes (codegen/kernels/rows.py)."""

from __future__ import annotations

from typing import Any

from codegen.schedules._common import Blocks, fuse_all, parallel_chunks, vector_split
from codegen.target import Target


def schedule_rows(blocks: Blocks, row_axes: int, target: Target) -> Any:
    """All stages of one row together, rows in parallel.

    The last block is the store; its first `row_axes` loops run over rows.
    """
    sch, store = blocks.sch, blocks.list[-1]
    loops = list(sch.get_loops(store))
    if len(loops) > row_axes:
        vector_split(sch, fuse_all(sch, loops[row_axes:]), target.lanes)
    _, row = parallel_chunks(sch, loops[:row_axes], target)
    stages = list(zip(blocks.list[:-1], blocks.names[:-1], strict=True))
    for block, _ in reversed(stages):
        sch.compute_at(block, row)
    for block, name in stages:
        _stage(sch, block, name, blocks, target)
    return sch


def _stage(sch: Any, block: Any, name: str, blocks: Blocks, target: Target) -> None:
    if name.endswith("_lanes"):
        lane, *depth = sch.get_loops(block)[2:]  # below the two loops over rows
        if not depth:  # a single vector: compute_at dropped the loop of one turn
            sch.vectorize(lane)
            return
        (k,) = depth
        sch.reorder(k, lane)
        sch.vectorize(lane)
        init = sch.decompose_reduction(block, k)
        sch.vectorize(sch.get_loops(init)[-1])
    elif not blocks.reduces(block) and name.startswith("rows_exp"):
        vector_split(sch, sch.get_loops(block)[-1], target.lanes)
