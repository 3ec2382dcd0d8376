"""Kernels too small to be worth a parallel region: serial, vectorised where it divides."""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import SMALL, Blocks, inline_all, size, vector_split
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """For functions all of whose blocks together run over less than SMALL points."""
    blocks = Blocks(func)
    sch = blocks.sch
    if not blocks.list:
        return None
    if sum(size(sch, list(sch.get_loops(b))) for b in blocks.list) >= SMALL:
        return None
    for block in inline_all(blocks):
        loops = sch.get_loops(block)
        if loops and not blocks.reduces(block):
            vector_split(sch, loops[-1], target.lanes)
    return sch


RULE = Rule("tiny", apply, kinds=("cpu", "edge"), order=45)
