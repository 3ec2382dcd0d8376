"""Everything data-parallel: arithmetic, activations, transposes, slices, concatenation."""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import Blocks, inline_all
from codegen.schedules._elementwise import spread
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """One loop nest for all blocks, parallel outside and vectors inside."""
    blocks = Blocks(func)
    if not blocks.list or any(blocks.reduces(b) for b in blocks.list):
        return None
    for block in inline_all(blocks):
        spread(blocks.sch, block, target)
    return blocks.sch


RULE = Rule("elementwise", apply, kinds=("cpu", "edge"), order=50)
