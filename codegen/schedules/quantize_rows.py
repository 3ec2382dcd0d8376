"""Rows of activations to uint8, each by its own range."""

from __future__ import annotations

from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.quantized import QUANTIZE, code_of, inverse_of, scale_of, zero_of
from codegen.kernels.tiles import build, reduce_row, scratch, vectors
from codegen.kernels.vector_math import f32
from codegen.rule import Rule
from codegen.target import Target

LARGEST = 3.4028234663852886e38


def _write(lanes: int, x: Any, q: Any, scale: Any, zero: Any) -> None:
    *lead, depth = (int(d) for d in x.shape)
    wide, count = int(q.shape[-1]), 1
    for n in lead:
        count *= n
    # Four registers hide the latency of a reduction's steps.
    wide_lanes = next((n * lanes for n in (4, 2) if depth % (n * lanes) == 0), lanes)
    with T.parallel(0, count) as flat:
        at = _index(flat, lead)
        nought, low, step, inverse, code = (scratch(1) for _ in range(5))
        T.buffer_store(nought, f32(0.0), [0])

        def reduced(value: Any, op: Any, first: float) -> Any:
            return reduce_row(depth, wide_lanes, lambda j: value(x[(*at, j)]), op, first)

        lowest = reduced(lambda v: v, lambda a, b: tirx.Select(a < b, a, b), LARGEST)
        T.buffer_store(low, lowest, [0])
        high = reduced(lambda v: v, lambda a, b: tirx.Select(a > b, a, b), -LARGEST)
        T.buffer_store(step, scale_of(low[0], high), [0])
        # Comparisons drop a NaN: the sum of x * 0 brings it back.
        lost = reduced(lambda v: v * nought[0], lambda a, b: a + b, 0.0)
        T.buffer_store(step, step[0] + lost, [0])
        T.buffer_store(scale, step[0], at)
        T.buffer_store(zero, zero_of(low[0], step[0]), at)
        T.buffer_store(code, tirx.Cast("float32", zero[at]), [0])
        T.buffer_store(inverse, inverse_of(step[0]), [0])
        vectors(
            depth,
            lanes,
            lambda j: T.buffer_store(q, code_of(x[(*at, j)], inverse[0], code[0]), [*at, j]),
        )
        if wide > depth:
            with T.serial(0, wide - depth) as j:
                T.buffer_store(q, tirx.const(0, "uint8"), [*at, depth + j])


def _index(flat: Any, sizes: list[int]) -> tuple[Any, ...]:
    index: list[Any] = []
    for size in reversed(sizes):
        index.insert(0, flat % size)
        flat = flat // size
    return tuple(index)


def apply(func: Any, target: Target) -> Any | None:
    """Rows in parallel: range, scale and zero, then the codes while the row is in cache."""
    if facts_of(func, QUANTIZE) is None:
        return None
    return tvm.s_tir.Schedule(build(func, lambda *b: _write(target.lanes, *b)))


RULE = Rule(QUANTIZE, apply, kinds=("cpu",), order=18)
