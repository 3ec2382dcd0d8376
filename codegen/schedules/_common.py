"""What the schedule rules share."""

from __future__ import annotations

import math
from typing import Any

import tvm.s_tir as st
from tvm import tirx

from codegen.target import Target, usable_cores

# Below this many elements a parallel region costs more than it saves.
SMALL = 4096


class Blocks:
    """The top-level blocks of one PrimFunc under a fresh schedule."""

    def __init__(self, func: Any) -> None:
        self.sch = st.Schedule(func)
        self.params = list(func.params)
        self.list = list(self.sch.get_child_blocks(self.sch.get_sblock("root")))
        self.names = [self.sch.get(b).name_hint for b in self.list]

    def named(self, name: str) -> Any:
        """The block called `name`."""
        return self.list[self.names.index(name)]

    def after(self, name: str) -> list[Any]:
        """The blocks that come after `name`, in order."""
        return self.list[self.names.index(name) + 1 :]

    def reduces(self, block: Any) -> bool:
        """Whether the block has an axis that is not data-parallel."""
        axes = self.sch.get(block).iter_vars
        return any(v.iter_type != tirx.IterVar.DataPar for v in axes)


def extent(sch: Any, loop: Any) -> int:
    """Extent of a static loop."""
    return int(sch.get(loop).extent)


def size(sch: Any, loops: list[Any]) -> int:
    """Product of the extents."""
    return math.prod(extent(sch, loop) for loop in loops)


def threads(target: Target) -> int:
    """Threads to cut work for."""
    return target.threads or int(target.tvm.get("num-cores", 0)) or usable_cores()


def parallel_chunks(sch: Any, loops: list[Any], target: Target) -> tuple[Any, Any]:
    """(parallel loop over chunks, loop inside a chunk) over all of `loops`.

    The chunks load the threads evenly and are as long as that allows. They are cut at one loop
    (the loops before it whole), because TVM can not prove a cut across fused loops safe.
    """
    sizes = [extent(sch, loop) for loop in loops]
    _, at, parts = _best_cut(sizes, target)
    outer, inner = sch.split(loops[at], [parts, None])
    chunk = fuse_all(sch, [*loops[:at], outer])
    sch.parallel(chunk)
    return chunk, fuse_all(sch, [inner, *loops[at + 1 :]])


def chunk_cost(sizes: list[int], target: Target) -> float:
    """Time of the busiest thread under `parallel_chunks`, 1.0 being an even share."""
    return _best_cut(sizes, target)[0]


def _best_cut(sizes: list[int], target: Target) -> tuple[float, int, int]:
    """(cost, which loop to cut, into how many parts)."""
    count, workers = math.prod(sizes), threads(target)

    def cost(at: int, parts: int) -> float:
        chunks = math.prod(sizes[:at]) * parts
        busiest = -(-chunks // workers) * workers / chunks
        return busiest * (1 + 0.02 * chunks / workers)

    cuts = ((at, c) for at, n in enumerate(sizes) for c in range(1, n + 1) if n % c == 0)
    return min(((cost(*cut), *cut) for cut in cuts), default=(float(count), 0, 1))


def vector_split(sch: Any, loop: Any, lanes: int) -> bool:
    """Vectorise `loop` in the widest whole vectors that divide it; False: left to LLVM.

    A split that does not divide would put a condition into the vector loop, which makes it
    scalar; LLVM's own vectoriser does a better job on the plain loop.
    """
    total = extent(sch, loop)
    width = next((w for w in (lanes, lanes // 2, lanes // 4) if w > 1 and total % w == 0), 0)
    if not width:
        return False
    if total == width:
        sch.vectorize(loop)
    else:
        sch.vectorize(sch.split(loop, [None, width])[1])
    return True


def fuse_all(sch: Any, loops: list[Any]) -> Any:
    """One loop over all of `loops`."""
    return sch.fuse(*loops) if len(loops) > 1 else loops[0]


def inline_all(blocks: Blocks) -> list[Any]:
    """Inline every data-parallel block that is no output; the blocks that are left."""
    left = []
    for block in blocks.list:
        writes = blocks.sch.get(block).writes
        if blocks.reduces(block) or any(w.source.same_as(p) for w in writes for p in blocks.params):
            left.append(block)
        else:
            blocks.sch.compute_inline(block)
    return left
