"""Rule ``newton``: small Gaussian systems, one head a task, products in register tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.landmarks import one_of
from codegen.kernels.newton import GUARD
from codegen.kernels.tiles import build, load, reduce_row, scratch, store, vectors
from codegen.kernels.vector_math import at_most, f32, vexp_nonpositive
from codegen.rule import Rule
from codegen.schedules.landmarks import _Square
from codegen.target import Target

NAME = "newton"


def _sum(n: int, lanes: int, value: Callable[[Any], Any]) -> Any:
    return reduce_row(n, lanes, value, lambda a, b: a + b, 0.0)


def _lift(facts: dict[str, Any], lanes: int, k: Any, *rest: Any) -> None:
    mask, out = (rest[0] if len(rest) == 2 else None), rest[-1]
    b_, g_, s_, d_ = (int(n) for n in k.shape)
    with T.parallel(0, b_ * g_) as n:
        b, g, peak = n // g_, n % g_, scratch(1, 1)
        T.buffer_store(peak, f32(0.0), [0, 0])
        with T.serial(0, s_) as j:
            value = _sum(d_, lanes, lambda d: load(k, b, g, j, d) * load(k, b, g, j, d))
            if mask is not None:
                value = tirx.Select(one_of(mask, b, j), value, f32(0.0))
            T.buffer_store(peak, tirx.max(peak[0, 0], value), [0, 0])
        T.buffer_store(peak, peak[0, 0] * f32(-0.5), [0, 0])
        with T.serial(0, s_) as j:
            vectors(d_, lanes, lambda d: store(out, [b, g, j, d], load(k, b, g, j, d)))
            store(out, [b, g, j, d_], f32(1.0))
            store(out, [b, g, j, d_ + 1], peak[0, 0])


def _solve(facts: dict[str, Any], lanes: int, x: Any, n: Any, *rest: Any) -> None:
    mask, out = (rest[0] if len(rest) == 2 else None), rest[-1]
    b_, g_, m_, _ = (int(v) for v in x.shape)
    w_ = int(n.shape[3])
    with T.parallel(0, b_ * g_) as task:
        b, g, on = task // g_, task % g_, _Square(m_, lanes)
        p, v, y, root = (*(on.new() for _ in range(3)), scratch(1, m_))
        for matrix in (p, v, y):
            on.clear(matrix)
        _system(facts, lanes, x, mask, (p, root), (b, g))
        with T.serial(0, m_) as i:
            T.buffer_store(v, f32(1.0), [i, i])
        with T.serial(0, int(facts["steps"])):
            on.product(p, v, on.less(2.0, y))
            next_ = on.new()
            on.product(v, y, lambda i, j, s: T.buffer_store(next_, s, [i, j]))
            with T.serial(0, m_) as i:
                vectors(m_, lanes, lambda j: T.buffer_store(v, next_[i, j], [i, j]))
        with T.serial(0, m_) as i:
            vectors(w_, lanes, lambda e: T.buffer_store(out, f32(0.0), [b, g, i, e]))
            with T.serial(0, m_) as j:

                def add(e: Any) -> None:
                    value = v[i, j] * root[0, j] * root[0, i] * n[b, g, j, e]
                    T.buffer_store(out, out[b, g, i, e] + value, [b, g, i, e])

                vectors(w_, lanes, add)
            guard = tirx.abs(out[b, g, i, w_ - 1]) * f32(GUARD)
            T.buffer_store(out, guard, [b, g, i, w_])


def _system(
    facts: dict[str, Any], lanes: int, x: Any, mask: Any, into: tuple[Any, Any], at: tuple[Any, Any]
) -> None:
    """p = r (A + ridge I) r, and r."""
    (p, root), (b, g), (m_, d_) = into, at, (int(v) for v in x.shape[2:])
    half = scratch(1, m_)
    with T.serial(0, m_) as i:
        square = _sum(d_, lanes, lambda d: x[b, g, i, d] * x[b, g, i, d])
        T.buffer_store(half, square * f32(0.5), [0, i])
    with T.serial(0, m_) as i:
        with T.serial(0, m_) as j:
            dot = _sum(d_, lanes, lambda d: x[b, g, i, d] * x[b, g, j, d])
            T.buffer_store(p, dot - half[0, i] - half[0, j], [i, j])

        def power(j: Any) -> None:
            # Rounding may lift a distance a little below 0.
            value = vexp_nonpositive(at_most(p[i, j], 0.0) * f32(facts["scale"]))
            if mask is not None:
                both = tirx.all(one_of(mask, b, i), one_of(mask, b, j))
                value = tirx.Select(both, value, f32(0.0))
            T.buffer_store(p, value, [i, j])

        vectors(m_, lanes, power)
        more: Any = f32(facts["ridge"])
        if mask is not None:
            more = tirx.Select(one_of(mask, b, i), more, f32(1.0))
        T.buffer_store(p, p[i, i] + more, [i, i])
        total = _sum(m_, lanes, lambda j: p[i, j])
        T.buffer_store(root, f32(1.0) / tirx.sqrt(total), [0, i])
    with T.serial(0, m_) as i:
        vectors(m_, lanes, lambda j: T.buffer_store(p, p[i, j] * root[0, i] * root[0, j], [i, j]))


_WRITERS: dict[str, Callable[..., None]] = {"lift": _lift, "solve": _solve}


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of one made by the kit's Gaussian calls, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    write = _WRITERS[facts["kernel"]]
    return tvm.s_tir.Schedule(build(func, lambda *args: write(facts, target.lanes, *args)))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
