"""Products of two computed matrices: each batch packs the right side into panels as it goes."""

from __future__ import annotations

from typing import Any

from codegen.kernels.dense import panel_width
from codegen.rule import Rule
from codegen.schedules._common import Blocks, parallel_chunks, size, threads
from codegen.schedules.dense import finish_tile, pack_panel, row_tile_of
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """Parallel over batches, and over panels within them when there are few."""
    blocks = Blocks(func)
    if "dense" not in blocks.names or "dense_panel" not in blocks.names:
        return None
    sch, product = blocks.sch, blocks.named("dense")
    after = blocks.after("dense")
    for block in after[:-1]:
        sch.compute_inline(block)
    store = after[-1] if after else sch.cache_write(product, 0, "global")
    *lead, rows, columns, depth = sch.get_loops(product)
    row_out, row_in = sch.split(rows, [None, row_tile_of(sch, store, target)])
    panel, column = sch.split(columns, [None, panel_width(target)])
    sch.reorder(*lead, panel, row_out, depth, row_in, column)
    if size(sch, lead) < 2 * threads(target):
        _, panel = parallel_chunks(sch, [*lead, panel], target)
    else:
        parallel_chunks(sch, lead, target)
    pack_panel(sch, blocks.named("dense_panel"), panel)
    finish_tile(sch, blocks, store, row_out, (row_in, column, depth), target)
    return sch


RULE = Rule("batch_matmul", apply, kinds=("cpu", "edge"), order=21)
