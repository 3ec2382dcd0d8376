"""Rule ``gpu_project``: the kit's per-head products x [B, H, T, D] by w [H, D, R]."""

from __future__ import annotations

from typing import Any

from codegen.kernels.attention import facts_of
from codegen.rule import Rule
from codegen.schedules._common import Blocks
from codegen.schedules._gpu_product import schedule_product
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """A tiled product for each batch and head."""
    if facts_of(func, "project") is None:
        return None
    blocks = Blocks(func)
    schedule_product(blocks, blocks.named("proj_sum"), blocks.after("proj_sum"))
    return blocks.sch


RULE = Rule("gpu_project", apply, kinds=("gpu",), order=10)
