"""Kernels too small to be worth a parallel region: serial, vectorised where it divides."""

from __future__ import annotations

from typing import Any

from codegen.rule import Rule
from codegen.schedules._common import SMALL, Blocks, size, vector_split
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """For functions all of whose blocks together run over less than SMALL points."""
    blocks = Blocks(func)
    sch = blocks.sch
    if not blocks.list:
        return None
    if sum(size(sch, list(sch.get_loops(b))) for b in blocks.list) >= SMALL:
        return None
    for block in blocks.list[:-1]:
        if not blocks.reduces(block):
            sch.compute_inline(block)
    last = blocks.list[-1]
    loops = sch.get_loops(last)
    if loops and not blocks.reduces(last):
        vector_split(sch, loops[-1], target.lanes)
    return sch


RULE = Rule("tiny", apply, kinds=("cpu", "edge"), order=45)
