"""Softmax and log-softmax along the last axis."""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import Blocks
from codegen.schedules._rows import schedule_rows
from codegen.target import Target

_NAMES = {"softmax"}


def apply(func: Any, target: Target) -> Any | None:
    """Rows in parallel, each row's stages in lanes while it is in cache."""
    blocks = Blocks(func)
    if not _NAMES.intersection(blocks.names[-1:]):
        return None
    axes = len(blocks.sch.get_loops(blocks.list[-1]))
    return schedule_rows(blocks, axes - 1, target)


RULE = Rule("softmax", apply, kinds=("cpu", "edge"), order=31)
