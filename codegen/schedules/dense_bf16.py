"""Matrix products of bfloat16 values, two of the depth in one instruction a vector."""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import Blocks
from codegen.schedules._dot import schedule_dot
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """Register tiles by vdpbf16ps, summed in float32, and all that follows on the tile."""
    blocks = Blocks(func)
    return schedule_dot(blocks, "bf16", target) if "dense_bf16" in blocks.names else None


RULE = Rule("dense_bf16", apply, kinds=("cpu",), order=18)
