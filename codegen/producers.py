"""Recognises the feature maps that made a value, so that the kit can fuse them with what reads it.

The kernels of the maps are left in the module; without a reader they are dead code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx

from codegen.kernels.attention import facts_of
from codegen.kernels.fused_linear import WEIGHTS


@dataclass(frozen=True)
class Features:
    """map(x), or map(scale x w) where the map is of a projection; x is [B, H, T, D]."""

    map: str
    x: Any
    w: Any = None
    scale: float = 1.0


def features_of(builder: Any, expr: Any) -> Features | None:
    """How the kit made `expr`, None if not by a feature map."""
    made = _kernel(builder, expr, "feature_map")
    if made is None:
        return None
    facts, (x,) = made
    if facts["map"] != "softmax_pair":
        return Features(facts["map"], x)
    made = _kernel(builder, x, "project")
    if made is None:
        return None
    x, w = made[1]
    return Features(facts["map"], x, w, float(made[0]["scale"]))


def features_of_both(builder: Any, q: Any, k: Any) -> tuple[Features, Features] | None:
    """The features of queries and keys where a kernel fuses their map, else None."""
    fq, fk = features_of(builder, q), features_of(builder, k)
    if fq is None or fk is None or fq.map != fk.map or fq.map not in WEIGHTS:
        return None
    return fq, fk


def _kernel(builder: Any, expr: Any, rule: str) -> tuple[dict[str, Any], list[Any]] | None:
    """(facts, arguments) of the kit's kernel meant for `rule` that made `expr`."""
    bound = builder.lookup_binding(expr) if isinstance(expr, relax.Var) else None
    if not isinstance(bound, relax.Call) or getattr(bound.op, "name", "") != "relax.call_tir":
        return None
    func = builder.get()[bound.args[0]]
    facts = facts_of(func, rule) if isinstance(func, tirx.PrimFunc) else None
    return None if facts is None else (facts, list(bound.args[1].fields))
