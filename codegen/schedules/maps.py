"""Rule ``map``: the feature maps of the kernelised forms, rows in parallel, vectors in a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM, facts_of
from codegen.kernels.maps import HALF_ROOT, HIGHEST
from codegen.kernels.tiles import build, load, reduce_row, scratch, store, vectors
from codegen.kernels.vector_math import at_least, at_most, f32, vexp_nonpositive
from codegen.kernels.views import Layout, take_layout
from codegen.rule import Rule
from codegen.target import Target

NAME = "map"


@dataclass(frozen=True)
class _Row:
    """One row of the output: b, h, i are its place, `at` the same as a list."""

    lanes: int
    facts: dict[str, Any]
    b: Any
    h: Any
    i: Any

    @property
    def at(self) -> list[Any]:
        return [self.b, self.h, self.i]

    def each(self, n: int, value: Callable[[Any], Any], out: Any, start: int = 0) -> None:
        """out[at, start + j] = value(j) for j < n."""
        vectors(n, self.lanes, lambda j: store(out, [*self.at, start + j], value(j)))

    def keep(self, n: int, value: Callable[[Any], Any]) -> Any:
        """value(j), j < n, in a scratch row [1, n]."""
        kept = scratch(1, n)
        vectors(n, self.lanes, lambda j: T.buffer_store(kept, value(j), [0, j]))
        return kept

    def total(self, n: int, value: Callable[[Any], Any]) -> Any:
        """The sum of value(j), j < n."""
        return reduce_row(n, self.lanes, value, lambda a, b: a + b, 0.0)


def _one(value: Any) -> Any:
    """A value held in memory, so that it is not computed again where it is read."""
    kept = scratch(1, 1)
    T.buffer_store(kept, value, [0, 0])
    return kept[0, 0]


def _share(out: Any, weight: Any) -> int:
    """How many heads share a row of a weight [W, X]."""
    return int(out.shape[1]) // int(weight.shape[0])


def _relu(row: _Row, x: Any, out: Any) -> None:
    floor = f32(row.facts["floor"])
    row.each(int(x.shape[3]), lambda j: at_least(load(x, *row.at, j), 0.0) + floor, out)


def _cosine(row: _Row, x: Any, table: Any, out: Any) -> None:
    d, floor = int(x.shape[3]), f32(row.facts["floor"])
    for half in (0, 1):
        turn = _one(load(table, row.i, half))

        def value(j: Any, turn: Any = turn) -> Any:
            return (at_least(load(x, *row.at, j), 0.0) + floor) * turn

        row.each(d, value, out, half * d)


def _exp_query(row: _Row, y: Any, *rest: Any) -> None:
    out = rest[-1]
    r, share = int(y.shape[3]), _share(out, rest[0]) if len(rest) == 2 else 1

    def moved(j: Any) -> Any:
        value = load(y, *row.at, j)
        return value + load(rest[0], row.h // share, j) if len(rest) == 2 else value

    top = _one(reduce_row(r, row.lanes, moved, tirx.max, MINIMUM))
    power = row.keep(r, lambda j: moved(j) - top)
    row.each(r, lambda j: vexp_nonpositive(power[0, j]), out)


def _exp_key(row: _Row, y: Any, x: Any, out: Any) -> None:
    def square(j: Any) -> Any:
        value = load(x, *row.at, j)
        return value * value

    half = _one(row.total(int(x.shape[3]), square) * f32(0.5 * row.facts["scale"]))
    floor = f32(row.facts["floor"])

    power = row.keep(int(y.shape[3]), lambda j: at_most(load(y, *row.at, j) - half, HIGHEST))
    # `vexp_nonpositive` is right up to 88, and no power is above HIGHEST.
    row.each(int(y.shape[3]), lambda j: vexp_nonpositive(power[0, j]) + floor, out)


def _polynomial(row: _Row, y: Any, out: Any) -> None:
    d = int(y.shape[3])
    twice = scratch(1, 2 * d)  # the row two times: no wrap around in the pairs
    for start in (0, d):
        vectors(
            d,
            row.lanes,
            lambda j, start=start: T.buffer_store(  # type: ignore[misc]
                twice, load(y, *row.at, j), [0, start + j]
            ),
        )
    first = 1 + d if row.facts["low"] else 1
    store(out, [*row.at, 0], f32(row.facts["flat"]))
    if row.facts["low"]:
        row.each(d, lambda j: twice[0, j], out, 1)
    row.each(d, lambda j: twice[0, j] * twice[0, j] * f32(HALF_ROOT), out, first)
    last = d // 2
    with T.serial(1, last if d % 2 == 0 else last + 1) as s:
        vectors(
            d,
            row.lanes,
            lambda j: store(out, [*row.at, first + s * d + j], twice[0, j] * twice[0, j + s]),
        )
    if d % 2 == 0:  # the last distance meets every pair twice
        row.each(last, lambda j: twice[0, j] * twice[0, j + last], out, first + last * d)


def _head_norm(row: _Row, x: Any, gamma: Any, beta: Any, out: Any) -> None:
    d, share = int(x.shape[3]), _share(out, gamma)
    mean = _one(row.total(d, lambda j: load(x, *row.at, j)) * f32(1.0 / d))
    apart = row.keep(d, lambda j: load(x, *row.at, j) - mean)
    squares = row.total(d, lambda j: apart[0, j] * apart[0, j])
    factor = _one(f32(1.0) / tirx.sqrt(squares * f32(1.0 / d) + f32(row.facts["eps"])))
    head = row.h // share

    def value(j: Any) -> Any:
        return apart[0, j] * factor * load(gamma, head, j) + load(beta, head, j)

    row.each(d, value, out)


def _glu(row: _Row, a: Any, b: Any, out: Any) -> None:
    width = int(a.shape[3])
    # From e^80 on the gate is 0 in all but name, and a larger power would overflow.
    power = row.keep(width, lambda j: at_most(f32(0.0) - load(b, *row.at, j), 80.0))

    def value(j: Any) -> Any:
        return load(a, *row.at, j) / (f32(1.0) + vexp_nonpositive(power[0, j]))

    row.each(width, value, out)


def _divide(row: _Row, x: Any, count: Any, out: Any) -> None:
    batch = 0 if int(count.shape[0]) == 1 else row.b
    safe = tirx.max(load(count, batch, 0, row.i, 0), f32(row.facts["tiny"]))
    factor = _one(f32(1.0) / safe)
    row.each(int(x.shape[3]), lambda j: load(x, *row.at, j) * factor, out)


def _token_norm(row: _Row, x: Any, out: Any) -> None:
    """Here a row is a token of all heads (`row.h` is not used)."""
    heads, width = int(x.shape[1]), int(x.shape[3])
    scale, total = f32(row.facts["scale"]), scratch(1, 1)
    T.buffer_store(total, f32(0.0), [0, 0])

    def scaled(h: Any, j: Any) -> Any:
        return load(x, row.b, h, row.i, j) * scale

    with T.serial(0, heads) as h:
        part = row.total(width, lambda j: scaled(h, j) * scaled(h, j))
        T.buffer_store(total, total[0, 0] + part, [0, 0])
    mean = total[0, 0] * f32(1.0 / (heads * width))
    factor = _one(f32(1.0) / tirx.sqrt(mean + f32(row.facts["eps"])))
    with T.serial(0, heads) as h:
        vectors(
            width,
            row.lanes,
            lambda j: store(out, [row.b, h, row.i, j], scaled(h, j) * factor),
        )


_WRITERS: dict[str, Callable[..., None]] = {
    "relu": _relu,
    "cosine": _cosine,
    "exp_query": _exp_query,
    "exp_key": _exp_key,
    "polynomial": _polynomial,
    "head_norm": _head_norm,
    "glu": _glu,
    "divide": _divide,
    "token_norm": _token_norm,
}


def _write(facts: dict[str, Any], layout: Layout | None, lanes: int, args: Any) -> None:
    write = _WRITERS[facts["map"]]
    inputs, out = list(args[:-1]), args[-1]
    if layout is not None:
        tensors, rest = layout.split(inputs)
        inputs = [*tensors, *rest]
        out = layout.output(out, inputs[0].shape) if layout.tokens_first else out
    batch, heads, tokens, _ = (int(n) for n in out.shape)
    heads = 1 if facts["map"] == "token_norm" else heads
    with T.parallel(0, batch * heads * tokens) as n:
        bh = n // tokens
        write(_Row(lanes, facts, bh // heads, bh % heads, n % tokens), *inputs, out)


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a map made by the kit, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    layout = take_layout(facts, int(facts["tensors"]))
    body = build(func, lambda *args: _write(facts, layout, target.lanes, args))
    return tvm.s_tir.Schedule(body)


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
