"""Products of a few rows with coded weights: panels side by side in registers, depth innermost."""

from __future__ import annotations

import re
from typing import Any

from codegen.kernels.binary import WEIGHT
from codegen.kernels.coded import has_tables
from codegen.rule import Rule
from codegen.schedules._coded import instruction, step_code
from codegen.schedules._common import Blocks, extent, fuse_all, parallel_chunks
from codegen.schedules._dot import IMPORT
from codegen.schedules.dense import store_block, store_vectors
from codegen.target import Target
from passes.linear_forms._codes import PANEL, CodeSpec

_NAME = re.compile(r"(coded|binary)_(add|fma)_b(\d)t(\d)$")
_REGISTERS = {"coded": 24, "binary": 16}  # of 32, for sums; tables of binary codes need some


def apply(func: Any, target: Target) -> Any | None:
    """Sums of some panels in registers; the codes of a word in one step where AVX-512 is."""
    blocks = Blocks(func)
    found = next((m for m in map(_NAME.match, blocks.names) if m), None)
    if found is None:
        return None
    spec = CodeSpec(int(found[3]), int(found[4]))
    kind = found[2] if found[1] == "coded" else f"binary_{found[2]}"
    sch, product = blocks.sch, blocks.named(found[0])
    if WEIGHT in blocks.names:
        sch.compute_inline(blocks.named(WEIGHT))
    store = store_block(blocks, found[0])
    rows, columns, group, inner = sch.get_loops(product)
    together = _together(sch, rows, columns, _REGISTERS[found[1]], target)
    chunk, panel = sch.split(columns, [None, PANEL * together])
    sch.reorder(chunk, group, rows, panel, inner)
    _, last = parallel_chunks(sch, [chunk], target)
    for name in ("coded_x", "binary_x", "binary_alpha"):
        if name in blocks.names:
            _vectors(sch, blocks.named(name))
    sch.reverse_compute_at(store, last)
    store_vectors(sch, store, target)
    if not has_tables(target):
        vector, lane = sch.split(panel, [None, target.lanes])
        sch.reorder(inner, lane)
        for loop in (rows, vector, inner):
            sch.unroll(loop)
        sch.vectorize(lane)
        sch.decompose_reduction(product, group)
        return sch
    start = sch.decompose_reduction(product, group)
    *_, row, column = sch.get_loops(start)
    sch.unroll(row)
    vector, lane = sch.split(column, [None, target.lanes])
    sch.unroll(vector)
    sch.vectorize(lane)
    index = str(sch.get(rows).loop_var.ty)
    count = extent(sch, rows)
    step = instruction(kind, spec, count, together, index)
    sch.tensorize(rows if count > 1 else panel, step)
    sch.annotate(last, IMPORT, step_code(kind, spec, target))
    return sch


def _vectors(sch: Any, block: Any) -> None:
    """What is made of the inputs once, before the product."""
    last = fuse_all(sch, sch.get_loops(block))
    sch.vectorize(sch.split(last, [None, 4])[1])


def _together(sch: Any, rows: Any, columns: Any, registers: int, target: Target) -> int:
    """Panels summed side by side: they share what is made for an input."""
    panels, vectors = extent(sch, columns) // PANEL, PANEL // target.lanes
    most = max(1, min(4, registers // (extent(sch, rows) * vectors)))
    return max(n for n in range(1, most + 1) if panels % n == 0)


RULE = Rule("coded_rows", apply, kinds=("cpu", "edge"), order=18)
