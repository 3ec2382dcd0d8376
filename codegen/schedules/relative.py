"""Rule ``relative``: factors of relative positions, a head at a time."""

from __future__ import annotations

from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.relative import HIDDEN, RelativeFacts
from codegen.kernels.tiles import build, reduce_row, scratch, vectors
from codegen.kernels.vector_math import f32, vexp_nonpositive
from codegen.rule import Rule
from codegen.target import Target

NAME = "relative"


def _write(facts: RelativeFacts, lanes: int, args: tuple[Any, ...]) -> None:
    *inputs, out = args
    offset, bias = inputs[0], inputs[1] if facts.bias else None
    batch, heads, queries, keys = (int(n) for n in out.shape)
    with T.parallel(0, batch * heads) as n:
        b, h = n // heads, n % heads
        peak = scratch(1, 1)
        T.buffer_store(peak, f32(HIDDEN), [0, 0])
        with T.serial(0, queries) as i:

            def put(j: Any, i: Any = i) -> None:
                T.buffer_store(out, facts.logit(offset, bias, b, h, i, j), [b, h, i, j])

            vectors(keys, lanes, put)
            high = reduce_row(
                keys,
                lanes,
                lambda j, i=i: out[b, h, i, j],  # type: ignore[misc]
                tirx.max,
                HIDDEN,
            )
            T.buffer_store(peak, tirx.max(peak[0, 0], high), [0, 0])
        with T.serial(0, queries) as i:

            def power(j: Any, i: Any = i) -> None:
                value = vexp_nonpositive(out[b, h, i, j] - peak[0, 0])
                if facts.causal:
                    value = tirx.Select(j <= i + (keys - queries), value, f32(0.0))
                T.buffer_store(out, value, [b, h, i, j])

            vectors(keys, lanes, power)


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of factors made by the kit, None for anything else."""
    data = facts_of(func, NAME)
    if data is None:
        return None
    facts = RelativeFacts.from_json(data)
    return tvm.s_tir.Schedule(build(func, lambda *args: _write(facts, target.lanes, args)))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
