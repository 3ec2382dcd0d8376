"""Row reductions in lanes, and any other reduction with vectors along a kept axis."""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import (
    SMALL,
    Blocks,
    inline_all,
    parallel_chunks,
    size,
    vector_split,
)
from codegen.schedules._elementwise import spread
from codegen.schedules._rows import schedule_rows
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """`row_reduction` kernels by rows; else each reduction by its kept axes."""
    blocks = Blocks(func)
    if "row_reduction" in blocks.names:
        return _rows(blocks, target)
    if not any(blocks.reduces(b) for b in blocks.list):
        return None
    sch = blocks.sch
    for block in inline_all(blocks):
        if blocks.reduces(block):
            _reduce(sch, block, target)
        else:
            spread(sch, block, target)
    return sch


def _rows(blocks: Blocks, target: Target) -> Any | None:
    """What was fused in front of the reduction is computed where it is read."""
    if blocks.names[-1] != "row_reduction":
        return None
    sch, kept, names = blocks.sch, [], []
    for block, name in zip(blocks.list, blocks.names, strict=True):
        if name == "row_reduction" or name.startswith("rows_"):
            kept.append(block)
            names.append(name)
        else:
            sch.compute_inline(block)
    blocks.list, blocks.names = kept, names
    return schedule_rows(blocks, len(sch.get_loops(kept[-1])), target)


def _reduce(sch: Any, block: Any, target: Target) -> None:
    stmt, loops = sch.get(block), list(sch.get_loops(block))
    kept = [x for x, v in zip(loops, stmt.iter_vars, strict=True) if v.iter_type == 0]
    reduced = [x for x in loops if all(x is not y for y in kept)]
    total = size(sch, loops)
    if not kept:
        sch.decompose_reduction(block, loops[0])
        return
    # A tuple reduction (argmax) can not be cut into vectors.
    if len(kept) > 1 and len(stmt.writes) == 1:
        sch.reorder(*kept[:-1], *reduced, kept[-1])
        vector_split(sch, kept.pop(), target.lanes)
    if total >= SMALL:
        parallel_chunks(sch, kept, target)
    if len(stmt.writes) == 1:
        sch.decompose_reduction(block, reduced[0])


RULE = Rule("reduction", apply, kinds=("cpu", "edge"), order=48)
