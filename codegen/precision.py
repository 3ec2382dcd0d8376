"""The precisions a model's products can be compiled in, and what each asks of a target."""

from __future__ import annotations

from codegen.target import Target
from passes.errors import UnknownName, UsageError

# Word of the command line -> what a manifest says.
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
# Processor features (words of /proc/cpuinfo), any of which will do.
NEEDS = {"fp32": (), "bf16": ("avx512_bf16",), "int8": ("avx512_vnni", "avx_vnni")}
_WHAT = {
    "bf16": "dot products of bfloat16 pairs",
    "int8": "dot products of 8-bit integers (VNNI)",
}


def why_not(precision: str, target: Target) -> str:
    """Why `target` has no code for a precision; "" when it has.

    Raises:
        UnknownName: no such precision.
    """
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    needed = NEEDS[precision]
    if not needed or (target.kind == "cpu" and set(needed) & set(target.features)):
        return ""
    return f"it needs {_WHAT[precision]}: a processor with {' or '.join(needed)}"


def require(precision: str, target: Target) -> None:
    """`UsageError` with the reason unless `target` has code for `precision`."""
    reason = why_not(precision, target)
    if reason:
        offered = [p for p in PRECISIONS if not why_not(p, target)]
        raise UsageError(
            f"precision {precision} is not to be had for target {target.name}: {reason}; "
            f"use {' or '.join(offered)}"
        )
