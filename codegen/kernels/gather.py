"""Reading rows of a table by index. An index out of range reads the nearest row, never beyond."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx


def gather_rows(table: Any, ids: Any) -> Any:
    """table [V, ...], ids [...] of any integer type -> ids.shape + table.shape[1:]."""
    rank, last = len(ids.shape), int(table.shape[0]) - 1
    dtype = str(ids.dtype)
    low, high = tirx.const(0, dtype), tirx.const(last, dtype)

    def row(*i: Any) -> Any:
        # Clamped in the index's own type: a cast to int32 first would wrap around.
        at = tirx.min(tirx.max(ids(*i[:rank]), low), high)
        return table(tirx.Cast("int64", at), *i[rank:])

    return te.compute((*ids.shape, *table.shape[1:]), row, name="gather_rows")
