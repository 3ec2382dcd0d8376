"""Rule ``landmarks``: means of runs of tokens, and small inverses, one head at a time.

The matrices of an inverse lie in scratch filled up to whole register tiles with zeros, which the
iterations keep at zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM, facts_of
from codegen.kernels.landmarks import TINY, filled, one_of, run_of
from codegen.kernels.tiles import (
    ROWS,
    build,
    imin,
    load,
    panels,
    reduce_row,
    scratch,
    tile,
    up,
    vectors,
)
from codegen.kernels.vector_math import at_least, f32, vexp_weight
from codegen.rule import Rule
from codegen.target import Target

NAME = "landmarks"


def _segments(facts: dict[str, Any], lanes: int, x: Any, *rest: Any) -> None:
    mask, out = (rest[0] if len(rest) == 2 else None), rest[-1]
    b_, g_, s_, d_ = (int(n) for n in x.shape)
    m_ = int(out.shape[2])
    runs = T.sblock_alloc_buffer((b_, s_), "int32")
    share = scratch(b_, m_)
    number, rank = (T.sblock_alloc_buffer((1,), "int32") for _ in range(2))
    with T.serial(0, b_) as b:
        T.buffer_store(number, tirx.const(s_ if mask is None else 0, "int32"), [0])
        T.buffer_store(rank, tirx.const(0, "int32"), [0])
        if mask is not None:
            with T.serial(0, s_) as j:
                one = tirx.Cast("int32", one_of(mask, b, j))
                T.buffer_store(number, number[0] + one, [0])
        with T.serial(0, m_) as r:
            T.buffer_store(share, f32(0.0), [b, r])
        with T.serial(0, s_) as j:
            one = tirx.const(1, "int32")
            if mask is not None:
                one = tirx.Cast("int32", one_of(mask, b, j))
            block = int(facts["block"])
            run = j // block if block else run_of(rank[0], number[0], m_)
            T.buffer_store(runs, run, [b, j])
            at = runs[b, j]
            T.buffer_store(share, share[b, at] + tirx.Cast("float32", one), [b, at])
            T.buffer_store(rank, rank[0] + one, [0])
        with T.serial(0, m_) as r:
            T.buffer_store(share, f32(1.0) / at_least(share[b, r], 1.0), [b, r])
    with T.parallel(0, b_ * g_) as n:
        b, g = n // g_, n % g_
        with T.serial(0, m_) as r:
            vectors(d_, lanes, lambda d: T.buffer_store(out, f32(0.0), [b, g, r, d]))
        with T.serial(0, s_) as j:

            def add(d: Any) -> None:
                value = load(x, b, g, j, d)
                if mask is not None:
                    value = tirx.Select(one_of(mask, b, j), value, f32(0.0))
                at = runs[b, j]
                T.buffer_store(out, out[b, g, at, d] + value, [b, g, at, d])

            vectors(d_, lanes, add)
        with T.serial(0, m_) as r:

            def divide(d: Any) -> None:
                T.buffer_store(out, out[b, g, r, d] * share[b, r], [b, g, r, d])

            vectors(d_, lanes, divide)


def _filled(facts: dict[str, Any], lanes: int, mask: Any, out: Any) -> None:
    filled(mask, out)


class _Square:
    """Matrices of `size` x `width`, m rounded up to whole tiles."""

    def __init__(self, m: int, lanes: int) -> None:
        self.m, self.lanes = m, lanes
        self.width = up(m, 2 * lanes)
        self.size = up(self.width, ROWS)

    def new(self) -> Any:
        return scratch(self.size, self.width)

    def clear(self, a: Any) -> None:
        with T.serial(0, self.size) as i:
            vectors(self.width, self.lanes, lambda j: T.buffer_store(a, f32(0.0), [i, j]))

    def product(self, a: Any, b: Any, put: Callable[[Any, Any, Any], None]) -> None:
        """put(i, j, (a b)[i, j])."""
        wide = 2 * self.lanes
        with T.serial(0, up(self.m, ROWS) // ROWS) as t, T.serial(0, self.width // wide) as c:
            tile(
                lambda i, x: a[t * ROWS + i, x],
                lambda x, j: b[x, c * wide + j],
                self.m,
                lambda i, j, s: put(t * ROWS + i, c * wide + j, s),
                width=wide,
            )

    def less(self, diagonal: float, into: Any) -> Callable[[Any, Any, Any], None]:
        """Store diagonal I - s."""

        def put(i: Any, j: Any, s: Any) -> None:
            own = tirx.Select(i == j, f32(diagonal), f32(0.0))
            T.buffer_store(into, own - s, [i, j])

        return put


def _pseudo_inverse(facts: dict[str, Any], lanes: int, q: Any, k: Any, w: Any, *rest: Any) -> None:
    mask, out = (rest[0] if len(rest) == 2 else None), rest[-1]
    b_, h_, m_, _ = (int(n) for n in q.shape)
    group = h_ // int(k.shape[1])
    with T.parallel(0, b_ * h_) as n:
        b, h = n // h_, n % h_
        on = _Square(m_, lanes)
        a, z, p, x, y = (on.new() for _ in range(5))
        for matrix in (a, z, p, x, y):
            on.clear(matrix)
        _softmax(float(facts["scale"]), lanes, (q, k, mask), a, (b, h, h // group))
        _start(on, a, z)
        with T.serial(0, int(facts["steps"])):
            on.product(a, z, lambda i, j, s: T.buffer_store(p, s, [i, j]))
            with T.serial(0, m_) as i:
                vectors(m_, lanes, lambda j: on.less(7.0, x)(i, j, p[i, j]))
            on.product(p, x, on.less(15.0, y))
            on.product(p, y, on.less(13.0, x))
            on.product(z, x, lambda i, j, s: T.buffer_store(y, s * f32(0.25), [i, j]))
            with T.serial(0, m_) as i:
                vectors(m_, lanes, lambda j: T.buffer_store(z, y[i, j], [i, j]))
        _times(z, w, out, (b, h), lanes)


def _softmax(scale: float, lanes: int, sides: Any, a: Any, at: tuple[Any, Any, Any]) -> None:
    (q, k, mask), (b, h, g) = sides, at
    m_, d_ = (int(n) for n in q.shape[2:])
    one = scratch(1, 1)
    with T.serial(0, m_) as i:
        with T.serial(0, m_) as j:
            dot = reduce_row(
                d_, lanes, lambda d: q[b, h, i, d] * k[b, g, j, d], lambda s, t: s + t, 0.0
            )
            score = dot * f32(scale)
            if mask is not None:
                score = tirx.Select(one_of(mask, b, j), score, f32(float("-inf")))
            T.buffer_store(a, score, [i, j])
        edge = reduce_row(m_, lanes, lambda j: a[i, j], tirx.max, MINIMUM)
        T.buffer_store(one, edge, [0, 0])
        vectors(m_, lanes, lambda j: T.buffer_store(a, vexp_weight(a[i, j] - one[0, 0]), [i, j]))
        total = reduce_row(m_, lanes, lambda j: a[i, j], lambda s, t: s + t, 0.0)
        T.buffer_store(one, f32(1.0) / at_least(total, TINY), [0, 0])
        vectors(m_, lanes, lambda j: T.buffer_store(a, a[i, j] * one[0, 0], [i, j]))


def _start(on: _Square, a: Any, z: Any) -> None:
    """z = a^T over the largest column sum of a."""
    m_, sums, one = on.m, scratch(1, on.width), scratch(1, 1)
    vectors(m_, on.lanes, lambda j: T.buffer_store(sums, f32(0.0), [0, j]))
    with T.serial(0, m_) as i:
        vectors(m_, on.lanes, lambda j: T.buffer_store(sums, sums[0, j] + a[i, j], [0, j]))
    edge = reduce_row(m_, on.lanes, lambda j: sums[0, j], tirx.max, TINY)
    T.buffer_store(one, f32(1.0) / edge, [0, 0])
    with T.serial(0, m_) as i, T.serial(0, m_) as j:
        T.buffer_store(z, a[j, i] * one[0, 0], [i, j])


def _times(z: Any, w: Any, out: Any, at: tuple[Any, Any], lanes: int) -> None:
    """out[at] = z w[at]."""
    (b, h), (m_, e_) = at, (int(n) for n in w.shape[2:])
    wide = scratch(m_, up(e_, lanes))
    with T.serial(0, m_) as i, T.serial(0, up(e_, lanes)) as e:
        T.buffer_store(wide, w[b, h, i, imin(e, e_ - 1)], [i, e])
    ot = scratch(ROWS, up(e_, lanes))
    with T.serial(0, up(m_, ROWS) // ROWS) as t:
        for start, width in panels(e_, lanes):
            tile(
                lambda i, x: z[t * ROWS + i, x],
                lambda x, e, start=start: wide[x, start + e],  # type: ignore[misc]
                m_,
                lambda i, e, s, start=start: T.buffer_store(  # type: ignore[misc]
                    ot, s, [i, start + e]
                ),
                width=width,
            )
        with T.serial(0, ROWS) as i, T.If(t * ROWS + i < m_), T.Then():
            vectors(
                e_, lanes, lambda e: T.buffer_store(out, ot[i, e], [b, h, t * ROWS + i, e])
            )  # fmt: skip


_WRITERS: dict[str, Callable[..., None]] = {
    "segments": _segments,
    "filled": _filled,
    "pseudo_inverse": _pseudo_inverse,
}


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of one made by the kit's landmark calls, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    write = _WRITERS[facts["kernel"]]
    return tvm.s_tir.Schedule(build(func, lambda *args: write(facts, target.lanes, *args)))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
