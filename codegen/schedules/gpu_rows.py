"""Rule ``gpu_rows``: norms, softmax and reductions along the last axis, a warp for each row."""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import Blocks
from codegen.schedules._gpu import schedule_rows
from codegen.target import Target

_STORES = ("layer_norm", "rms_norm", "softmax", "row_reduction")


def apply(func: Any, target: Target) -> Any | None:
    """For the kernels of codegen/kernels/norm.py, softmax.py and reductions.py."""
    blocks = Blocks(func)
    if not blocks.names or blocks.names[-1] not in _STORES:
        return None
    if not any(name.startswith("rows_") for name in blocks.names):
        return None
    return schedule_rows(blocks, ("rows_exp",), target)


RULE = Rule("gpu_rows", apply, kinds=("gpu",), order=30)
