"""Reading table rows by index (embeddings), with what follows computed on the row."""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import Blocks, inline_all
from codegen.schedules._elementwise import spread
from codegen.target import Target

_NAMES = {"gather_rows", "T_take", "T_gather", "index_tensor"}


def apply(func: Any, target: Target) -> Any | None:
    """Rows in parallel, vectors along a row."""
    blocks = Blocks(func)
    if not _NAMES.intersection(blocks.names) or any(blocks.reduces(b) for b in blocks.list):
        return None
    for block in inline_all(blocks):
        spread(blocks.sch, block, target)
    return blocks.sch


RULE = Rule("gather", apply, kinds=("cpu", "edge"), order=35)
