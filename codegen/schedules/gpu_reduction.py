"""Rule ``gpu_reduction``: any other sums (convolutions, argmax, ..), a warp or a thread each."""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import Blocks, inline_all
from codegen.schedules._gpu import bind_stage
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """Each block that is left after inlining is one kernel."""
    blocks = Blocks(func)
    if not any(blocks.reduces(b) for b in blocks.list):
        return None
    for block in inline_all(blocks):
        bind_stage(blocks, block)
    return blocks.sch


RULE = Rule("gpu_reduction", apply, kinds=("gpu",), order=48)
