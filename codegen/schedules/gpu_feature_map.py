"""Rule ``gpu_feature_map``: softmax pair (a warp for each row) and elu + 1 (a thread for each)."""

from __future__ import annotations

from typing import Any

from codegen.kernels.attention import facts_of
from codegen.rule import Rule
from codegen.schedules._common import Blocks
from codegen.schedules._gpu import bind_spread, schedule_rows
from codegen.target import Target

_KEPT = ("pair_exp", "pair_exp_minus")


def apply(func: Any, target: Target) -> Any | None:
    """For the feature maps of the kit (codegen/kernels/feature_maps.py)."""
    facts = facts_of(func, "feature_map")
    if facts is None:
        return None
    blocks = Blocks(func)
    if facts["map"] != "softmax_pair":
        bind_spread(blocks.sch, blocks.list[-1])
        return blocks.sch
    return schedule_rows(blocks, _KEPT, target)


RULE = Rule("gpu_feature_map", apply, kinds=("gpu",), order=10)
