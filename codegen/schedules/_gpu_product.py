"""Matrix products on a GPU: tiles in shared memory, a small tile of results in each thread."""

from __future__ import annotations

from typing import Any

from codegen.schedules._common import Blocks, extent, fuse_all
from codegen.schedules._gpu import bind_spread

SIDE = 16  # threads of a block along rows and along columns
EACH = 4  # results of a thread along rows and along columns
DEPTH = 16  # length of the sums one pass through shared memory holds
FEW_ROWS = 8  # below: a tile would be mostly empty


def schedule_product(blocks: Blocks, product: Any, after: list[Any]) -> None:
    """`product` [.., M, N] (sum over its last loop) and what follows it, as one kernel.

    Blocks before it must be inlined; of the blocks `after` it the last one stores.
    """
    sch = blocks.sch
    for block in after[:-1]:
        sch.compute_inline(block)
    *lead, rows, columns, depth = sch.get_loops(product)
    if extent(sch, rows) < FEW_ROWS:
        _thread_each(sch, product, after)
        return
    if after:
        sch.set_scope(product, 0, "local")
        store = after[-1]
    else:
        store = sch.cache_write(product, 0, "local")
    i0, i1, i2 = sch.split(rows, [None, SIDE, EACH])
    j0, j1, j2 = sch.split(columns, [None, SIDE, EACH])
    k0, k1 = sch.split(depth, [None, DEPTH])
    sch.reorder(*lead, i0, j0, i1, j1, k0, k1, i2, j2)
    sch.bind(fuse_all(sch, [*lead, i0, j0]), "blockIdx.x")
    sch.bind(i1, "threadIdx.y")
    sch.bind(j1, "threadIdx.x")
    sch.reverse_compute_at(store, j1)
    for operand in range(2):
        _stage_tile(sch, product, operand, k0)
    sch.unroll(i2)
    sch.unroll(j2)
    sch.decompose_reduction(product, k0)


def _stage_tile(sch: Any, product: Any, operand: int, at: Any) -> None:
    """All threads of the block fetch the operand's tile together."""
    copy = sch.cache_read(product, operand, "shared")
    sch.compute_at(copy, at, preserve_unit_loops=True)
    count = len(sch.get(copy).iter_vars)
    tile = fuse_all(sch, list(sch.get_loops(copy))[-count:])
    _, row, lane = sch.split(tile, [None, SIDE, SIDE])
    sch.bind(row, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")


def _thread_each(sch: Any, product: Any, after: list[Any]) -> None:
    """One thread for each result: neighbours read neighbouring columns."""
    if not after:
        bind_spread(sch, product, threads=64)
        return
    bind_spread(sch, after[-1], threads=64)
    sch.set_scope(product, 0, "local")
    sch.compute_at(product, sch.get_loops(after[-1])[-1])
