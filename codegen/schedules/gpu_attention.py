"""Rule ``gpu_attention``: softmax attention, one block for (batch, head, tile of queries).

Each query of the tile belongs to one warp: its lanes make the scores of all keys, find their
maximum and sum by shuffles, and then take a column of V each. Scores and exponentials of the tile
stay in shared memory; where not even one query fits, every stage is a kernel of its own.
"""

from __future__ import annotations

from typing import Any

from codegen.kernels.attention import facts_of
from codegen.rule import Rule
from codegen.schedules._common import Blocks
from codegen.schedules._gpu import (
    bind_stage,
    bytes_of_rows,
    rows_per_block,
    schedule_row_blocks,
)
from codegen.target import Target

_STAGES = ("attn_scores", "attn_max", "attn_exp", "attn_sum", "attn_values")
_ROW_AXES = 3  # batch, head, query


def apply(func: Any, target: Target) -> Any | None:
    """For the attention of the kit (codegen/kernels/attention.py)."""
    if facts_of(func, "attention") is None:
        return None
    blocks = Blocks(func)
    sch = blocks.sch
    for block, name in zip(blocks.list, blocks.names, strict=True):
        if name not in (*_STAGES, "attn_out"):
            sch.compute_inline(block)
    *stages, values = (blocks.named(name) for name in _STAGES)
    store = blocks.named("attn_out")
    queries = int(sch.get(store).writes[0].source.shape[2])
    rows = rows_per_block(queries, bytes_of_rows(blocks, stages, _ROW_AXES), target)
    if rows:
        schedule_row_blocks(blocks, stages, store, _ROW_AXES, rows, direct=values)
    else:
        for block in (*stages, values, store):
            bind_stage(blocks, block)
    return sch


RULE = Rule("gpu_attention", apply, kinds=("gpu",), order=10)
