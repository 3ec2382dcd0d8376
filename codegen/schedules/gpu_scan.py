"""Rule ``gpu_scan``: functions TVM already wrote with threads (its sorts and scans for GPUs)."""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """Takes a function that binds threads as it is."""
    return func if "threadIdx.x" in str(func) else None


RULE = Rule("gpu_scan", apply, kinds=("gpu",), order=5)
