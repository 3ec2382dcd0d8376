"""Rule ``fixed_rows``: products with codes in fixed point; a few rows share the codes of a word."""

from __future__ import annotations

import re
from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import Blocks, fuse_all, parallel_chunks
from codegen.target import Target
from passes.linear_forms._codes import PANEL
from passes.linear_forms._fixed import row_tile

_NAME = re.compile(r"fixed_add_b\dt\d$")


def apply(func: Any, target: Target) -> Any | None:
    """Panels in parallel; sums of some rows in registers, a vector of columns at a time."""
    blocks = Blocks(func)
    name = next((n for n in blocks.names if _NAME.match(n)), None)
    if name is None:
        return None
    sch, product = blocks.sch, blocks.named(name)
    rows, columns, group, inner = sch.get_loops(product)
    tile = row_tile(int(sch.get(rows).extent))
    outer, row = sch.split(rows, [None, tile])
    panel, vector, lane = sch.split(columns, [None, PANEL // target.lanes, target.lanes])
    sch.reorder(panel, outer, vector, group, inner, row, lane)
    parallel_chunks(sch, [panel], target)
    sch.unroll(inner)
    sch.unroll(row)
    sch.vectorize(lane)
    sch.decompose_reduction(product, group)
    for other in ("fixed_x", "fixed_out"):
        _each(sch, blocks.named(other), target)
    return sch


def _each(sch: Any, block: Any, target: Target) -> None:
    """What is done once for each input or output, rows in parallel."""
    parallel_chunks(sch, [fuse_all(sch, sch.get_loops(block))], target)


RULE = Rule("fixed_rows", apply, kinds=("cpu", "edge"), order=18)
