"""Reductions along the last axis, in lanes: the building block of norms, softmax and reductions.

LLVM may not reorder float sums, so a plain row sum stays scalar. Here each lane of a vector
register keeps its own partial result; the lanes are reduced at the end of the row. What does not
fill whole vectors is reduced apart, so no lane is ever masked.

Block names end in ``_lanes`` (the vector part), ``_rest`` (the remainder) and ``_all``; the
schedule helper codegen/schedules/_rows.py knows them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx


@dataclass(frozen=True)
class Reducer:
    """A commutative reduction: TE's reducer and the same as a function of two values."""

    reduce: Callable[..., Any]
    join: Callable[[Any, Any], Any]


# isnan, not a != a: TVM simplifies that to False.
def _keep_nan_max(a: Any, b: Any) -> Any:
    return tirx.Select(tirx.any(a > b, tirx.isnan(a)), a, b)


def _keep_nan_min(a: Any, b: Any) -> Any:
    return tirx.Select(tirx.any(a < b, tirx.isnan(a)), a, b)


SUM = Reducer(te.sum, lambda a, b: a + b)
# Drops NaN where the other value is a number: for softmax, whose exp brings the NaN back.
MAX = Reducer(te.max, tirx.max)
NAN_MAX = Reducer(te.comm_reducer(_keep_nan_max, tirx.min_value, name="nan_max"), _keep_nan_max)
NAN_MIN = Reducer(te.comm_reducer(_keep_nan_min, tirx.max_value, name="nan_min"), _keep_nan_min)


def row_reduce(
    lead: tuple[int, ...],
    width: int,
    value: Callable[..., Any],
    reducer: Reducer,
    lanes: int,
    name: str,
) -> Any:
    """Tensor of shape `lead`: `value(*i, j)` reduced over j in 0..width by `reducer`."""
    while lanes > 1 and width < lanes:
        lanes //= 2
    whole = width // lanes
    parts = []
    if whole:
        parts.append(_lanes(lead, whole, value, reducer, lanes, name))
    if width % lanes or not whole:
        rest = te.reduce_axis((0, width - whole * lanes), name=f"{name}_t")
        parts.append(
            te.compute(
                lead,
                lambda *i: reducer.reduce(value(*i, whole * lanes + rest), axis=rest),
                name=f"{name}_rest",
            )
        )
    if len(parts) == 1:
        return parts[0]
    return te.compute(lead, lambda *i: reducer.join(parts[0](*i), parts[1](*i)), name=f"{name}_sum")


def _lanes(
    lead: tuple[int, ...],
    whole: int,
    value: Callable[..., Any],
    reducer: Reducer,
    lanes: int,
    name: str,
) -> Any:
    k = te.reduce_axis((0, whole), name=f"{name}_k")
    lane = te.reduce_axis((0, lanes), name=f"{name}_l")
    partial = te.compute(
        (*lead, lanes),
        lambda *i: reducer.reduce(value(*i[:-1], k * lanes + i[-1]), axis=k),
        name=f"{name}_lanes",
    )
    return te.compute(
        lead, lambda *i: reducer.reduce(partial(*i, lane), axis=lane), name=f"{name}_all"
    )
