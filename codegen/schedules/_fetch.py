"""Asking for memory ahead of its use, where a processor does not foresee it by itself.

A row of one head is a short run, far from the next one in a projection [T, 3 H D], while a
processor's own prefetching follows runs.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.schedules._dot import IMPORT
from codegen.target import Target

_NAME = "rewriter_fetch"
_LINE = 16  # float32 values of a line of the cache


def fetching(target: Target) -> dict[str, str]:
    """Annotations of a loop around calls of `fetch_row`: LLVM code of what they call."""
    mattr = ",".join(target.tvm.get("mattr", ()))
    code = f"""
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define void @{_NAME}(ptr %place) #0 {{
  call void @llvm.prefetch.p0(ptr %place, i32 0, i32 3, i32 1)
  ret void
}}
attributes #0 = {{ alwaysinline nounwind "target-cpu"="{target.tvm["mcpu"]}" \
"target-features"="{mattr}" }}
"""
    return {IMPORT: code}


def fetch_row(x: Any, *lead: Any) -> None:
    """Ask for x[*lead, :], a row of a buffer or of a view of one."""
    for d in range(0, int(x.shape[-1]), _LINE):
        place = tirx.address_of(x[(*lead, d)])
        T.evaluate(tirx.call_extern("void", _NAME, place))
