"""Rule ``gpu_hamming``: hashing and attention over codes, each stage a kernel of its own."""

from __future__ import annotations

from typing import Any

from codegen.kernels import gpu_hamming
from codegen.kernels.attention import facts_of
from codegen.rule import Rule
from codegen.schedules._common import Blocks, inline_all
from codegen.schedules._gpu import bind_stage
from codegen.target import Target

_WHOLE = ("hash_codes", "sign_codes", "angular_attention", "table_attention")


def apply(func: Any, target: Target) -> Any | None:
    """For the kernels of codegen/kernels/hamming.py, angular.py and table_attention.py.

    The causal PrimFunc of hamming carries a state from key to key; it is replaced by the chunked
    definition of codegen/kernels/gpu_hamming.py.
    """
    if all(facts_of(func, n) is None for n in _WHOLE):
        facts = facts_of(func, "hamming_attention")
        if facts is None:
            return None
        if facts["causal"]:
            func = gpu_hamming.causal(func, facts)
    blocks = Blocks(func)
    for block in inline_all(blocks):
        bind_stage(blocks, block)
    return blocks.sch


RULE = Rule("gpu_hamming", apply, kinds=("gpu",), order=10)
