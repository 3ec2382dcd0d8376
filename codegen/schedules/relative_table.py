"""Rule ``relative_table``: factors by distance out of a bias, and the keys that it shows."""

from __future__ import annotations

from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM, facts_of
from codegen.kernels.relative import HIDDEN
from codegen.kernels.tiles import build, imax, imin, load, reduce_row, scratch, vectors
from codegen.kernels.vector_math import f32, vexp_nonpositive
from codegen.rule import Rule
from codegen.target import Target

NAME = "relative_table"


def _table(causal: bool, lanes: int, args: tuple[Any, ...]) -> None:
    offset, *biases, out = args
    batch, heads, wide = (int(n) for n in out.shape)
    tokens, reach = (wide + 1) // 2, int(offset.shape[1]) // 2
    with T.parallel(0, batch * heads) as n:
        b, h, peak = n // heads, n % heads, scratch(1, 1)
        for bias in biases:
            low = lambda t: T.buffer_store(out, f32(MINIMUM), [b, h, t])  # noqa: E731
            vectors(wide, lanes, low)
            head = 0 if int(bias.shape[1]) == 1 else h
            with T.serial(0, tokens) as i:

                def high(j: Any, i: Any = i, bias: Any = bias, head: Any = head) -> None:
                    at = [b, h, j - i + (tokens - 1)]
                    value = tirx.max(out[tuple(at)], load(bias, b, head, i, j))
                    T.buffer_store(out, value, at)

                vectors(tokens, lanes, high)

        def logit(t: Any) -> None:
            value = load(offset, h, imin(imax(t - (tokens - 1), -reach), reach) + reach)
            T.buffer_store(out, value + out[b, h, t] if biases else value, [b, h, t])

        def power(t: Any) -> None:
            value = vexp_nonpositive(out[b, h, t] - peak[0, 0])
            if causal:
                value = tirx.Select(t < tokens, value, f32(0.0))
            T.buffer_store(out, value, [b, h, t])

        vectors(wide, lanes, logit)
        highest = reduce_row(wide, lanes, lambda t: out[b, h, t], tirx.max, HIDDEN)
        T.buffer_store(peak, highest, [0, 0])
        vectors(wide, lanes, power)


def _visible(lanes: int, args: tuple[Any, ...]) -> None:
    bias, out = args
    batch, tokens = (int(n) for n in out.shape)
    with T.parallel(0, batch) as b:
        high = scratch(1, tokens)
        vectors(tokens, lanes, lambda j: T.buffer_store(high, f32(MINIMUM), [0, j]))
        with T.serial(0, tokens) as i:

            def take(j: Any, i: Any = i) -> None:
                value = tirx.max(high[0, j], load(bias, b, 0, i, j))
                T.buffer_store(high, value, [0, j])

            vectors(tokens, lanes, take)
        with T.serial(0, tokens) as j:
            T.buffer_store(out, high[0, j] > f32(HIDDEN), [b, j])


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a table or of visible keys made by the kit, None for others."""
    data = facts_of(func, NAME)
    if data is None:
        return None

    def body(*args: Any) -> None:
        if data["visible"]:
            _visible(target.lanes, args)
        else:
            _table(data["causal"], target.lanes, args)

    return tvm.s_tir.Schedule(build(func, body))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
