"""Rule ``gpu_coded``: products with coded weights, which are made where a tile of them is read.

Many rows: a tile of weights is made in shared memory from its words, for all rows of a block. Few
rows: one thread for each result makes its weights as it goes.
"""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import Blocks
from codegen.schedules._gpu_product import schedule_product
from codegen.target import Target

PRODUCT, WEIGHT = "coded_product", "coded_weight"


def apply(func: Any, target: Target) -> Any | None:
    """For the products of codegen/kernels/coded.py and binary.py."""
    blocks = Blocks(func)
    if PRODUCT not in blocks.names:
        return None
    weight = blocks.named(WEIGHT)
    for block in blocks.list[: blocks.names.index(PRODUCT)]:
        if not block.same_as(weight):
            blocks.sch.compute_inline(block)
    schedule_product(blocks, blocks.named(PRODUCT), blocks.after(PRODUCT))
    blocks.sch.compute_inline(weight)  # into the copy of a tile, where there is one
    return blocks.sch


RULE = Rule("gpu_coded", apply, kinds=("gpu",), order=18)
