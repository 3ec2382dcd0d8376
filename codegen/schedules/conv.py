"""Convolutions: register tiles of output pixels x channels; depthwise along the output row."""

from __future__ import annotations

from typing import Any

from codegen.kernels.dense import row_tile
from codegen.rule import Rule
from codegen.schedules._common import Blocks, extent, parallel_chunks, vector_split
from codegen.schedules._elementwise import spread
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """Takes functions with a block ``conv`` or ``grouped_conv`` and what was fused behind it."""
    blocks = Blocks(func)
    if "conv" in blocks.names:
        return _general(blocks, target)
    if "grouped_conv" in blocks.names:
        return _grouped(blocks, target)
    return None


def _general(blocks: Blocks, target: Target) -> Any:
    sch, product = blocks.sch, blocks.named("conv")
    store = _tail(blocks, "conv")
    wide = extent(sch, sch.get_loops(store)[3])
    batch, out, row, column, lane, c, dy, dx = sch.get_loops(product)
    column_out, column_in = sch.split(column, [None, row_tile(wide, target)])
    sch.reorder(batch, out, row, column_out, c, dy, dx, column_in, lane)
    parallel_chunks(sch, [batch, out, row], target)
    sch.reverse_compute_at(store, column_out)
    sch.unroll(column_in)
    sch.vectorize(lane)
    sch.decompose_reduction(product, c)
    _pad(blocks, target)
    return sch


def _grouped(blocks: Blocks, target: Target) -> Any:
    sch, product = blocks.sch, blocks.named("grouped_conv")
    store = _tail(blocks, "grouped_conv")
    batch, out, row, column, c, dy, dx = sch.get_loops(product)
    sch.reorder(batch, out, row, c, dy, dx, column)
    vector_split(sch, column, target.lanes)
    _, inner = parallel_chunks(sch, [batch, out, row], target)
    if store is not None:
        sch.reverse_compute_at(store, inner)
        vector_split(sch, sch.get_loops(store)[-1], target.lanes)
    sch.decompose_reduction(product, c)
    _pad(blocks, target)
    return sch


def _tail(blocks: Blocks, name: str) -> Any:
    after = blocks.after(name)
    for block in after[:-1]:
        blocks.sch.compute_inline(block)
    return after[-1] if after else None


def _pad(blocks: Blocks, target: Target) -> None:
    for block, name in zip(blocks.list, blocks.names, strict=True):
        if name == "conv_pad":
            spread(blocks.sch, block, target)


RULE = Rule("conv", apply, kinds=("cpu", "edge"), order=25)
