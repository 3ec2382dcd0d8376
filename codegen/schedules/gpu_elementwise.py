"""Rule ``gpu_elementwise``: everything data-parallel, one thread for each element."""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import Blocks, inline_all
from codegen.schedules._gpu import bind_spread
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """One kernel for each output."""
    blocks = Blocks(func)
    if not blocks.list or any(blocks.reduces(b) for b in blocks.list):
        return None
    for block in inline_all(blocks):
        bind_spread(blocks.sch, block)
    return blocks.sch


RULE = Rule("gpu_elementwise", apply, kinds=("gpu",), order=50)
