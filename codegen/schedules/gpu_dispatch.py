"""Rule ``gpu_dispatch``: layers of two experts, a warp for each logit, a thread for each result."""

from __future__ import annotations

from typing import Any

from codegen.kernels.attention import facts_of
from codegen.kernels.dispatch import NAME
from codegen.rule import Rule
from codegen.schedules._common import Blocks
from codegen.schedules._gpu import bind_reduction, bind_spread
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """For the stages of codegen/kernels/gpu_dispatch.py, None for anything else."""
    if facts_of(func, NAME) is None:
        return None
    blocks = Blocks(func)
    logits, product, end = blocks.list
    sch = blocks.sch
    bind_reduction(sch, logits)
    bind_spread(sch, product)
    bind_spread(sch, end)
    return sch


RULE = Rule("gpu_dispatch", apply, kinds=("gpu",), order=10)
