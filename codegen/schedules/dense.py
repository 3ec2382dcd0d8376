"""Matrix products against panels, with whatever follows them computed on the register tile."""

from __future__ import annotations

from typing import Any

from codegen.kernels.dense import panel_width, row_tile
from codegen.rule import Rule
from codegen.schedules._common import (
    Blocks,
    chunk_cost,
    extent,
    fuse_all,
    parallel_chunks,
    vector_split,
)
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """Tiles of rows x panel in registers; weights as constants or packed by the kernel."""
    blocks = Blocks(func)
    if "dense" not in blocks.names:
        return None
    if "dense_panel" in blocks.names and _batched(blocks):
        return None
    sch, product = blocks.sch, blocks.named("dense")
    store = _store_block(blocks)
    *lead, rows, columns, depth = sch.get_loops(product)
    mt = row_tile_of(sch, store, target)
    row_out, row_in = sch.split(rows, [None, mt])
    panel, column = sch.split(columns, [None, panel_width(target)])
    sch.reorder(*lead, row_out, panel, depth, row_in, column)
    tile = _parallel(sch, blocks, [*lead, row_out], panel, target)
    finish_tile(sch, blocks, store, tile, (row_in, column, depth), target)
    return sch


def row_tile_of(sch: Any, store: Any, target: Target) -> int:
    """The tile height the TE definition chose: a function of the stored rows."""
    loops = sch.get_loops(store)
    return row_tile(extent(sch, loops[-2]), target)


def _batched(blocks: Blocks) -> bool:
    """Whether the panels differ from batch to batch (then batch_matmul's rule takes it)."""
    panel = blocks.sch.get(blocks.named("dense_panel"))
    return len(panel.iter_vars) > 3


def _store_block(blocks: Blocks) -> Any:
    """Inline all that follows the product into one last block; make one if nothing follows."""
    sch, after = blocks.sch, blocks.after("dense")
    for block in after[:-1]:
        sch.compute_inline(block)
    if after:
        return after[-1]
    return sch.cache_write(blocks.named("dense"), 0, "global")


def _parallel(sch: Any, blocks: Blocks, tiles: list[Any], panel: Any, target: Target) -> Any:
    """Parallel over row tiles or over panels, whichever loads the threads better.

    Inside one thread a panel is used for all of the thread's rows before the next one is read.
    """
    packs = "dense_panel" in blocks.names
    rows, panels = [extent(sch, t) for t in tiles], [extent(sch, panel)]
    sch.reorder(panel, *tiles)  # leaves the panel outside; chunks of rows go around it
    if packs or chunk_cost(panels, target) < chunk_cost(rows, target):
        _, inner = parallel_chunks(sch, [panel], target)
        if packs:
            pack_panel(sch, blocks.named("dense_panel"), inner)
        return fuse_all(sch, tiles)
    chunk, inner = parallel_chunks(sch, tiles, target)
    sch.reorder(chunk, panel, inner)
    return inner


def pack_panel(sch: Any, block: Any, at: Any) -> None:
    """Pack one panel where it is about to be used."""
    sch.compute_at(block, at)
    sch.vectorize(sch.get_loops(block)[-1])


def finish_tile(
    sch: Any, blocks: Blocks, store: Any, tile: Any, inner: tuple[Any, Any, Any], target: Target
) -> None:
    """Registers for the tile, and the epilogue on it before it is stored."""
    product, (row, column, depth) = blocks.named("dense"), inner
    sch.reverse_compute_at(store, tile)
    store_loops = sch.get_loops(store)
    vector_split(sch, store_loops[-1], target.lanes)
    sch.unroll(row)
    sch.vectorize(column)
    sch.decompose_reduction(product, depth)


RULE = Rule("dense", apply, kinds=("cpu", "edge"), order=20)
