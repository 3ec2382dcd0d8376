"""Matrix products against panels, with whatever follows them computed on the register tile."""

from __future__ import annotations

import math
from typing import Any

from codegen.kernels.dense import panel_width, row_tile
from codegen.rule import Rule
from codegen.schedules._common import (
    Blocks,
    chunk_cost,
    extent,
    fuse_all,
    parallel_chunks,
    size,
    threads,
    vector_split,
)
from codegen.target import Target

_TILES = 32  # a thread's tiles of rows from which making a panel is little beside its product


def apply(func: Any, target: Target) -> Any | None:
    """Tiles of rows x panel in registers; weights as constants or packed by the kernel."""
    blocks = Blocks(func)
    if "dense" not in blocks.names:
        return None
    if "dense_panel" in blocks.names and _batched(blocks):
        return None
    sch, product = blocks.sch, blocks.named("dense")
    store = store_block(blocks, "dense")
    *lead, rows, columns, depth = sch.get_loops(product)
    mt = row_tile_of(sch, store, target)
    over_panels = weight_dominates(sch, [*lead, rows], columns, depth)
    row_out, row_in = sch.split(rows, [None, mt])
    panel, column = sch.split(columns, [None, panel_width(target)])
    sch.reorder(*lead, row_out, panel, depth, row_in, column)
    tile = _parallel(sch, blocks, [*lead, row_out], panel, over_panels, target)
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


def store_block(blocks: Blocks, name: str) -> Any:
    """Inline all that follows the product `name` into one last block, made if nothing follows."""
    sch, after = blocks.sch, blocks.after(name)
    for block in after[:-1]:
        sch.compute_inline(block)
    if after:
        return after[-1]
    return sch.cache_write(blocks.named(name), 0, "global")


def weight_dominates(sch: Any, rows: list[Any], columns: Any, depth: Any) -> bool:
    """Whether the weight is larger than what is read and written for all rows."""
    n, k = extent(sch, columns), extent(sch, depth)
    return n * k > size(sch, rows) * (n + k)


def _parallel(
    sch: Any, blocks: Blocks, tiles: list[Any], panel: Any, over_panels: bool, target: Target
) -> Any:
    """Parallel over row tiles or over panels, whichever loads the threads better.

    Inside one thread a panel is used for all of the thread's rows before the next one is read.
    """
    if "dense_panel" not in blocks.names:
        return row_parallel(sch, tiles, panel, over_panels, target)
    sch.reorder(panel, *tiles)
    if _each_makes_panels(sch, tiles, panel, over_panels, target):
        tile, at = _chunks_of_rows(sch, tiles, panel, target), panel
    else:
        _, at = parallel_chunks(sch, [panel], target)
        tile = fuse_all(sch, tiles)
    pack_panel(sch, blocks.named("dense_panel"), at)
    return tile


def _each_makes_panels(
    sch: Any, tiles: list[Any], panel: Any, over_panels: bool, target: Target
) -> bool:
    """Whether threads share rows and each makes all panels: rows are many, so that this is little.

    Every thread then reads its own rows of x only.
    """
    rows = [extent(sch, t) for t in tiles]
    by_panels = chunk_cost([extent(sch, panel)], target)
    many = math.prod(rows) >= _TILES * threads(target)
    return many and not over_panels and chunk_cost(rows, target) <= by_panels


def row_parallel(sch: Any, tiles: list[Any], panel: Any, over_panels: bool, target: Target) -> Any:
    """As `dense` for packed panels: parallel over row tiles or panels; the loop over tiles.

    Where both load the threads alike, `over_panels` decides: each thread then fetches its own part
    of the weight, which the caches seldom still hold from the last inference; over rows, its own
    rows of x, which the same thread often wrote.
    """
    rows, panels = [extent(sch, t) for t in tiles], [extent(sch, panel)]
    sch.reorder(panel, *tiles)
    by_panels, by_rows = chunk_cost(panels, target), chunk_cost(rows, target)
    if by_panels < by_rows or (over_panels and by_panels == by_rows):
        parallel_chunks(sch, [panel], target)
        return fuse_all(sch, tiles)
    return _chunks_of_rows(sch, tiles, panel, target)


def _chunks_of_rows(sch: Any, tiles: list[Any], panel: Any, target: Target) -> Any:
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
    store_vectors(sch, store, target)
    sch.unroll(row)
    sch.vectorize(column)
    sch.decompose_reduction(product, depth)


def store_vectors(sch: Any, store: Any, target: Target) -> None:
    """Vectors along the last loop of the block that stores."""
    vector_split(sch, sch.get_loops(store)[-1], target.lanes)


RULE = Rule("dense", apply, kinds=("cpu", "edge"), order=20)
