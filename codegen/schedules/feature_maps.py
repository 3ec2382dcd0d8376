"""Rule ``feature_map``: softmax pair and elu + 1, row by row with vector exponentials."""

from __future__ import annotations

from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM, facts_of
from codegen.kernels.tiles import build, load, reduce_row, scratch, store, vectors
from codegen.kernels.vector_math import at_least, at_most, f32, vexp_nonpositive
from codegen.rule import Rule
from codegen.target import Target

NAME = "feature_map"


def _rows(shape: list[int]) -> tuple[int, Any]:
    """Number of rows of a tensor and the function from row number to its leading index."""
    lead = shape[:-1]
    number = 1
    for n in lead:
        number *= n

    def index(row: Any) -> list[Any]:
        out: list[Any] = []
        for n in reversed(lead):
            out.insert(0, row % n)
            row = row // n
        return out

    return number, index


def _elu1(lanes: int, x: Any, out: Any) -> None:
    shape = [int(n) for n in x.shape]
    number, index = _rows(shape)
    with T.parallel(0, number) as row:
        at = index(row)

        def put(j: Any) -> None:
            y = load(x, *at, j)
            value = at_least(y, 0.0) + vexp_nonpositive(at_most(y, 0.0))
            store(out, [*at, j], value)

        vectors(shape[-1], lanes, put)


def _pair(lanes: int, y: Any, out: Any) -> None:
    shape = [int(n) for n in y.shape]
    r_ = shape[-1]
    number, index = _rows(shape)
    with T.parallel(0, number) as row:
        at = index(row)
        for sign in (0, 1):
            _half(lanes, y, out, at, r_, sign)


def _half(lanes: int, y: Any, out: Any, at: list[Any], r_: int, sign: int) -> None:
    """softmax(y) (sign 0) or softmax(-y) (sign 1) of one row of r_ features."""
    extreme, first = (tirx.min, -MINIMUM) if sign else (tirx.max, MINIMUM)
    edge, e, total = scratch(1, 1), scratch(1, r_), scratch(1, 1)
    peak = reduce_row(r_, lanes, lambda j: load(y, *at, j), extreme, first)
    T.buffer_store(edge, peak, [0, 0])

    def exponent(j: Any) -> None:
        value = load(y, *at, j)
        below = edge[0, 0] - value if sign else value - edge[0, 0]
        T.buffer_store(e, vexp_nonpositive(below), [0, j])

    vectors(r_, lanes, exponent)
    z = reduce_row(r_, lanes, lambda j: e[0, j], lambda a, b: a + b, 0.0)
    # One division for a row; the definition divides each element, equal within rounding.
    T.buffer_store(total, f32(1.0) / z, [0, 0])
    vectors(r_, lanes, lambda j: store(out, [*at, sign * r_ + j], e[0, j] * total[0, 0]))


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a feature map made by the kit, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    write = _pair if facts["map"] == "softmax_pair" else _elu1
    return tvm.s_tir.Schedule(build(func, lambda x, out: write(target.lanes, x, out)))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
