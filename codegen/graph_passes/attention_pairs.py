"""Which softmax attentions multiply pairs of bfloat16 (rule ``attention_bf16``)."""

from __future__ import annotations

import json
from typing import Any

from tvm import tirx

from codegen.kernels.attention import KERNEL, RULE, facts_of
from codegen.schedules import attention, attention_bf16
from codegen.schedules._pairs import has_pairs
from codegen.target import Target


def attention_pairs(mod: Any, target: Target, precision: str) -> Any:
    """`mod` with its float32 softmax attentions marked for bfloat16, where that is faster.

    Under "bf16" and under "int8" (whose own products are worse still), on processors that take
    products of bfloat16 pairs at twice the rate of float32's. Everything else stays as it is.
    """
    if precision == "fp32" or not has_pairs(target):
        return mod
    changed = mod.clone()
    for gv, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            facts = facts_of(func, attention.NAME)
            if facts is not None and str(func.params[0].dtype) == "float32":
                known = json.dumps({**facts, "rule": attention_bf16.NAME}, sort_keys=True)
                marked = func.with_attr(KERNEL, known).with_attr(RULE, attention_bf16.NAME)
                changed.update_func(gv, marked)
    return changed
