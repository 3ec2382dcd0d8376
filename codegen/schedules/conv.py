"""Convolutions: register tiles of output pixels x channels."""

from __future__ import annotations

from typing import Any

from codegen.kernels.dense import panel_width, row_tile
from codegen.rule import Rule
from codegen.schedules._common import Blocks, chunk_cost, extent, parallel_chunks, vector_split
from codegen.schedules._depthwise import depthwise
from codegen.schedules._elementwise import spread
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """Takes functions with one of the blocks below and what was fused behind it."""
    blocks = Blocks(func)
    if "conv" in blocks.names:
        return _general(blocks, target)
    if "depthwise" in blocks.names:
        return depthwise(func, blocks, target)
    if "grouped_conv" in blocks.names:
        return _grouped(blocks, target)
    return None


def _general(blocks: Blocks, target: Target) -> Any:
    """Tiles of columns x panel of channels; parallel over rows or panels."""
    sch, product = blocks.sch, blocks.named("conv")
    store = _tail(blocks, "conv") or sch.cache_write(product, 0, "global")
    wide = extent(sch, sch.get_loops(store)[2])
    batch, row, column, out, dy, dx, c = sch.get_loops(product)
    column_out, column_in = sch.split(column, [None, row_tile(wide, target)])
    panel, lane = sch.split(out, [None, panel_width(target)])
    sch.reorder(batch, row, panel, column_out, dy, dx, c, column_in, lane)
    by_rows = chunk_cost([extent(sch, batch), extent(sch, row)], target)
    if chunk_cost([extent(sch, panel)], target) < by_rows:
        sch.reorder(panel, batch, row)
        parallel_chunks(sch, [panel], target)
    else:
        parallel_chunks(sch, [batch, row], target)
    sch.reverse_compute_at(store, column_out)
    vector_split(sch, sch.get_loops(store)[-1], target.lanes)
    sch.unroll(column_in)
    sch.vectorize(lane)
    sch.decompose_reduction(product, dy)
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
