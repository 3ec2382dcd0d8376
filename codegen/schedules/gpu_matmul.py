"""Rule ``gpu_matmul``: matrix products as the importer gives them, with what follows fused in."""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import Blocks
from codegen.schedules._gpu_product import schedule_product
from codegen.target import Target

_PRODUCTS = ("matmul", "NT_matmul", "dense")


def apply(func: Any, target: Target) -> Any | None:
    """For functions with one reduction, which is a product over its last loop."""
    blocks = Blocks(func)
    sums = [n for n, b in zip(blocks.names, blocks.list, strict=True) if blocks.reduces(b)]
    if len(sums) != 1 or sums[0] not in _PRODUCTS:
        return None
    product = blocks.named(sums[0])
    kinds = [int(v.iter_type) for v in blocks.sch.get(product).iter_vars]
    if len(kinds) < 3 or any(kinds[:-1]):
        return None
    for block in blocks.list[: blocks.names.index(sums[0])]:
        blocks.sch.compute_inline(block)
    schedule_product(blocks, product, blocks.after(sums[0]))
    return blocks.sch


RULE = Rule("gpu_matmul", apply, kinds=("gpu",), order=20)
