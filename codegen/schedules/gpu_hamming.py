"""Rule ``gpu_hamming``: hashing and attention over codes, each stage a kernel of its own."""

from __future__ import annotations

from typing import Any

from codegen.kernels.attention import facts_of
from codegen.rule import Rule
from codegen.schedules._common import Blocks, inline_all
from codegen.schedules._gpu import bind_stage
from codegen.target import Target


_WHOLE = ("hash_codes", "sign_codes", "angular_attention", "table_attention")


def apply(func: Any, target: Target) -> Any | None:
    """For the kernels of codegen/kernels/hamming.py and angular.py that are not causal."""
    if all(facts_of(func, n) is None for n in _WHOLE):
        facts = facts_of(func, "hamming_attention")
        if facts is None or facts["causal"]:
            return None
    blocks = Blocks(func)
    for block in inline_all(blocks):
        bind_stage(blocks, block)
    return blocks.sch


RULE = Rule("gpu_hamming", apply, kinds=("gpu",), order=10)
