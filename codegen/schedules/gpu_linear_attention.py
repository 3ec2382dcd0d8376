"""Rule ``gpu_linear_attention``: bidirectional and causal, each stage a kernel of its own.

The causal PrimFunc of the kit has plain loops that carry a state from chunk to chunk; it is
replaced by the chunked definition of codegen/kernels/gpu_linear_attention.py, whose stages are
parallel.
"""

from __future__ import annotations

from typing import Any

from codegen.kernels import gpu_linear_attention
from codegen.kernels.attention import facts_of
from codegen.rule import Rule
from codegen.schedules._common import Blocks, inline_all
from codegen.schedules._gpu import bind_stage
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """For the linear attentions of the kit (codegen/kernels/linear_attention.py)."""
    facts = facts_of(func, "linear_attention")
    if facts is None:
        return None
    if facts["causal"]:
        func = gpu_linear_attention.causal(func, float(facts["eps"]))
    blocks = Blocks(func)
    for block in inline_all(blocks):
        bind_stage(blocks, block)
    return blocks.sch


RULE = Rule("gpu_linear_attention", apply, kinds=("gpu",), order=10)
