"""Rule ``row_map``: maps of rows around an attention, rows in parallel, vectors in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.tiles import build, load, reduce_row, scratch, store, vectors
from codegen.kernels.vector_math import at_least, at_most, f32, vexp, vexp_nonpositive
from codegen.kernels.views import Layout, take_layout
from codegen.rule import Rule
from codegen.target import Target

NAME = "row_map"
At = tuple[Any, Any, Any]  # b, h, i of a row


def _one(value: Any) -> Any:
    """A value held in memory, so that it is not computed again where it is read."""
    kept = scratch(1, 1)
    T.buffer_store(kept, value, [0, 0])
    return kept[0, 0]


def _total(n: int, lanes: int, value: Callable[[Any], Any]) -> Any:
    return _one(reduce_row(n, lanes, value, lambda a, b: a + b, 0.0))


def _gate(facts: dict[str, Any], lanes: int, at: At, *tensors: Any) -> None:
    x, q, w, b, out = tensors
    dot = _total(int(q.shape[3]), lanes, lambda d: load(q, *at, d) * load(w, at[1], d))
    # From e^80 on the gate is 0 in all but name, and a larger power would overflow.
    power = _one(at_most(f32(0.0) - dot - load(b, at[1], 0), 80.0))
    factor = _one(f32(facts["gain"]) / (f32(1.0) + vexp_nonpositive(power)))
    vectors(
        int(x.shape[3]), lanes, lambda e: store(out, [*at, e], load(x, *at, e) * factor)
    )  # fmt: skip


def _scale_channels(facts: dict[str, Any], lanes: int, at: At, *tensors: Any) -> None:
    x, g, *mask, out = tensors
    (b, h, i), group = at, int(g.shape[1]) // int(x.shape[1])

    def put(e: Any) -> None:
        value = load(x, b, h // group, i, e) * load(g, b, h, 0, e)
        if mask:
            row = 0 if int(mask[0].shape[0]) == 1 else b
            value = tirx.Select(mask[0][row, i], value, f32(0.0))
        store(out, [*at, e], value)

    vectors(int(g.shape[3]), lanes, put)


def _add_rows(facts: dict[str, Any], lanes: int, at: At, *tensors: Any) -> None:
    x, q, *share, out = tensors
    factor = _one(load(share[0], at[0], at[1], 0, 0)) if share else f32(1.0)
    vectors(
        int(q.shape[3]),
        lanes,
        lambda e: store(out, [*at, e], load(x, *at, e) + load(q, *at, e) * factor),
    )


def _ratio(facts: dict[str, Any], lanes: int, at: At, x: Any, last: Any, out: Any) -> None:
    below = tirx.max(load(last, *at, 0), load(last, *at, 1))
    factor = _one(f32(1.0) / at_least(below, facts["least"]))
    vectors(int(x.shape[3]), lanes, lambda e: store(out, [*at, e], load(x, *at, e) * factor))


def _extend(facts: dict[str, Any], lanes: int, at: At, x: Any, out: Any) -> None:
    d_ = int(x.shape[3])
    square = _total(d_, lanes, lambda d: load(x, *at, d) * load(x, *at, d))
    vectors(d_, lanes, lambda d: store(out, [*at, d], load(x, *at, d)))
    store(out, [*at, d_], square * f32(facts["factor"]))
    if facts["one"]:
        store(out, [*at, d_ + 1], f32(1.0))


def _mixture(facts: dict[str, Any], lanes: int, at: At, *tensors: Any) -> None:
    k, shift, rate, mix, out = tensors
    (_, g, _), d_, parts = at, int(k.shape[3]), int(shift.shape[1])
    y = scratch(1, d_)
    own: Any = f32(0.0)
    if facts["key_norm"]:
        own = _total(d_, lanes, lambda d: load(k, *at, d) * load(k, *at, d))
    for r in range(parts):
        c, start = _one(vexp(load(rate, g, r))), r * (d_ + 2)

        def move(d: Any, r: int = r) -> None:
            T.buffer_store(y, load(k, *at, d) + load(shift, g, r, d), [0, d])

        vectors(d_, lanes, move)
        far = _total(d_, lanes, lambda d: y[0, d] * y[0, d])

        def put(d: Any, c: Any = c, start: int = start) -> None:
            store(out, [*at, start + d], y[0, d] * c)

        vectors(d_, lanes, put)
        store(out, [*at, start + d_], c)
        size = (own - far) * f32(0.5) * c + load(mix, g, r) * f32(facts["inverse"])
        store(out, [*at, start + d_ + 1], size)


_WRITERS: dict[str, Callable[..., None]] = {
    "gate": _gate,
    "scale_channels": _scale_channels,
    "add_rows": _add_rows,
    "extend": _extend,
    "ratio": _ratio,
    "mixture": _mixture,
}


def _write(facts: dict[str, Any], layout: Layout | None, lanes: int, args: Any) -> None:
    inputs, out = list(args[:-1]), args[-1]
    if layout is not None:
        tensors, rest = layout.split(inputs)
        inputs = [*tensors, *rest]
        out = layout.output(out, inputs[0].shape) if layout.tokens_first else out
    batch, heads, tokens, _ = (int(n) for n in out.shape)
    with T.parallel(0, batch * heads * tokens) as n:
        bh = n // tokens
        at = (bh // heads, bh % heads, n % tokens)
        _WRITERS[facts["map"]](facts, lanes, at, *inputs, out)


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a row map made by the kit, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    layout = take_layout(facts, int(facts["tensors"]))
    body = build(func, lambda *args: _write(facts, layout, target.lanes, args))
    return tvm.s_tir.Schedule(body)


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
