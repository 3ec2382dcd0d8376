"""What the GPU rules share: every top-level block becomes one kernel with blocks and threads.

Loops are bound to blockIdx and threadIdx; what several blocks of a PrimFunc hand to each other
goes through global memory, unless a rule computes it at a block's loop in shared memory.
"""

from __future__ import annotations

import math
from typing import Any

from codegen.schedules._common import Blocks, extent, fuse_all, size
from codegen.target import Target

WARP = 32
THREADS = 256
MAX_ROWS = 8  # rows of one block in the row-wise rules: one warp each


def bind_spread(sch: Any, block: Any, threads: int = THREADS) -> None:
    """A data-parallel block, or a reduction with one thread per result, over the whole grid."""
    loops = list(sch.get_loops(block))
    stmt = sch.get(block)
    kept = [x for x, v in zip(loops, stmt.iter_vars, strict=False) if v.iter_type == 0]
    if not kept:
        kept = [sch.add_unit_loop(loops[0] if loops else block)]
    elif len(kept) < len(loops):
        sch.reorder(*kept, *(x for x in loops if all(x is not y for y in kept)))
    count = size(sch, kept)
    width = min(threads, -(-count // WARP) * WARP)
    outer, inner = sch.split(fuse_all(sch, kept), [None, width])
    sch.bind(outer, "blockIdx.x")
    sch.bind(inner, "threadIdx.x")


def bind_reduction(sch: Any, block: Any) -> None:
    """One warp for each result: its lanes share the reduction."""
    loops = list(sch.get_loops(block))
    stmt = sch.get(block)
    kept = [x for x, v in zip(loops, stmt.iter_vars, strict=True) if v.iter_type == 0]
    summed = [x for x in loops if all(x is not y for y in kept)]
    if not kept:
        kept = [sch.add_unit_loop(loops[0])]
    sch.reorder(*kept, *summed)
    warps = largest_divisor(size(sch, kept), MAX_ROWS)
    grid, row = sch.split(fuse_all(sch, kept), [None, warps])
    _, lane = sch.split(fuse_all(sch, summed), [None, WARP])
    sch.bind(grid, "blockIdx.x")
    sch.bind(row, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")


def bind_stage(blocks: Blocks, block: Any) -> None:
    """`block` as a kernel of its own, by a warp for each result where results are few."""
    sch = blocks.sch
    if blocks.reduces(block) and _few_long_sums(sch, block):
        bind_reduction(sch, block)
    else:
        bind_spread(sch, block)


def _few_long_sums(sch: Any, block: Any) -> bool:
    """Whether lanes that share a sum beat one thread for each: it has work and neighbours gain.

    A sum over the last axis of what it reads is contiguous for the lanes of a warp.
    """
    stmt, loops = sch.get(block), list(sch.get_loops(block))
    if len(stmt.writes) != 1:  # argmax and its like
        return False
    axes = list(zip(loops, stmt.iter_vars, strict=True))
    kept = [x for x, v in axes if v.iter_type == 0]
    summed = [x for x, v in axes if v.iter_type != 0]
    results = size(sch, kept) if kept else 1
    return size(sch, summed) >= WARP and results <= 64 * THREADS


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def shared_limit(target: Target) -> int:
    """Bytes of shared memory a block may use without opting in."""
    return int(target.tvm["max_shared_memory_per_block"])


def rows_per_block(rows: int, bytes_per_row: int, target: Target) -> int:
    """How many rows one block works on (one warp each); 0 if not even one row fits."""
    fit = shared_limit(target) // max(bytes_per_row, 1)
    return min(MAX_ROWS, rows, fit)


def schedule_row_blocks(
    blocks: Blocks, stages: list[Any], store: Any, row_axes: int, rows: int, direct: Any = None
) -> None:
    """One kernel: a warp for each row; `stages` (in order) stay in shared memory.

    The first `row_axes` loops of `store` run over rows, the last of them in tiles of `rows`;
    the lanes of a warp share the other axes. Each stage has the same row axes first. `direct` is
    a stage read only by `store`, element by element: it stays in registers.
    """
    sch = blocks.sch
    loops = list(sch.get_loops(store))
    tile, row = sch.split(loops[row_axes - 1], [None, rows])
    grid = fuse_all(sch, [*loops[: row_axes - 1], tile])
    rest = loops[row_axes:]
    lane = fuse_all(sch, rest) if rest else sch.add_unit_loop(store)
    sch.bind(grid, "blockIdx.x")
    sch.bind(row, "threadIdx.y")
    inner = _bind_lanes(sch, lane)
    if direct is not None:
        sch.set_scope(direct, 0, "local")
        sch.compute_at(direct, inner)
    for stage in reversed(stages):
        _stage_in_shared(blocks, stage, row_axes, grid)


def _bind_lanes(sch: Any, lane: Any) -> Any:
    _, inner = sch.split(lane, [None, WARP])
    sch.bind(inner, "threadIdx.x")
    return inner


def _stage_in_shared(blocks: Blocks, stage: Any, row_axes: int, grid: Any) -> None:
    """Row -> threadIdx.y; the lanes take the other kept axes, or share the sum where none is."""
    sch = blocks.sch
    columns = _kept_axes(sch, stage) > row_axes
    summing = stage
    if columns and blocks.reduces(stage):
        # A sum in shared memory would need a barrier for each of its terms.
        stage = sch.cache_write(summing, 0, "local")
    # One value for a row: the shuffles leave it in every lane, and TVM puts no barrier between
    # lane 0's write to shared memory and the others' reads at the same index.
    sch.set_scope(stage, 0, "shared" if columns else "local")
    sch.compute_at(stage, grid, preserve_unit_loops=True)
    inside = list(sch.get_loops(stage))[1:]
    sch.bind(fuse_all(sch, inside[:row_axes]), "threadIdx.y")
    rest = inside[row_axes:]
    lane = fuse_all(sch, rest) if rest else sch.add_unit_loop(stage)
    inner = _bind_lanes(sch, lane)
    if summing is not stage:
        sch.compute_at(summing, inner)


def bytes_of_rows(blocks: Blocks, stages: list[Any], row_axes: int) -> int:
    """Shared memory one row of all `stages` takes (float32)."""
    total = 0
    for stage in stages:
        shape = blocks.sch.get(stage).writes[0].source.shape
        total += 4 * math.prod(int(n) for n in shape[row_axes:])
    return total


def schedule_rows(blocks: Blocks, kept: tuple[str, ...], target: Target) -> Any:
    """Row-wise stages as one kernel, the last block storing; data-parallel ones are inlined.

    Those named in `kept` are stages too, unless the rows are too long for shared memory. Without
    row axes (one row in all) each stage is a kernel.
    """
    sch, store = blocks.sch, blocks.list[-1]
    stages = []
    for block, name in zip(blocks.list[:-1], blocks.names[:-1], strict=True):
        if blocks.reduces(block) or name in kept:
            stages.append(block)
        else:
            sch.compute_inline(block)
    row_axes = min(_kept_axes(sch, block) for block in stages)
    rows = 0
    if row_axes:
        tokens = extent(sch, list(sch.get_loops(store))[row_axes - 1])
        rows = rows_per_block(tokens, bytes_of_rows(blocks, stages, row_axes), target)
    if rows:
        schedule_row_blocks(blocks, stages, store, row_axes, rows)
    else:
        for block in (*stages, store):
            bind_stage(blocks, block)
    return sch


def _kept_axes(sch: Any, block: Any) -> int:
    return len([v for v in sch.get(block).iter_vars if v.iter_type == 0])
