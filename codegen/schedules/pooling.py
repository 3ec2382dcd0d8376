"""Rule ``pooling``: tokens pooled into slots, in register tiles, eight slots of one head a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.landmarks import one_of
from codegen.kernels.pooling import TINY
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
from codegen.kernels.vector_math import at_least, f32
from codegen.rule import Rule
from codegen.target import Target

NAME = "pooling"


def _size(lanes: int, w: Any, mask: Any, at: tuple[Any, Any, Any]) -> Any:
    """sum |w| over the visible keys (over all with mask None) of slot `at`."""
    b, g, slot = at

    def value(j: Any) -> Any:
        size = tirx.abs(load(w, g, slot, j))
        return size if mask is None else tirx.Select(one_of(mask, b, j), size, f32(0.0))

    return reduce_row(int(w.shape[2]), lanes, value, lambda a, c: a + c, 0.0)


def _pool(lanes: int, w: Any, x: Any, *rest: Any) -> None:
    mask, out = (rest[0] if len(rest) == 2 else None), rest[-1]
    b_, g_, s_, d_ = (int(n) for n in x.shape)
    r_, padded = int(w.shape[1]), up(d_, lanes)
    xp = scratch(b_ * g_, s_, padded)
    with T.parallel(0, b_ * g_ * s_) as n:
        bg, j = n // s_, n % s_
        with T.serial(0, padded) as d:
            T.buffer_store(xp, load(x, bg // g_, bg % g_, j, imin(d, d_ - 1)), [bg, j, d])
    tiles = up(r_, ROWS) // ROWS
    with T.parallel(0, b_ * g_ * tiles) as n:
        bg, first = n // tiles, (n % tiles) * ROWS
        b, g = bg // g_, bg % g_
        weight, factor, ot = scratch(ROWS, s_), scratch(ROWS, 1), scratch(ROWS, padded)
        with T.serial(0, ROWS) as i:
            slot = imin(first + i, r_ - 1)

            def put(j: Any, i: Any = i, slot: Any = slot) -> None:
                value = load(w, g, slot, j)
                if mask is not None:
                    value = tirx.Select(one_of(mask, b, j), value, f32(0.0))
                T.buffer_store(weight, value, [i, j])

            vectors(s_, lanes, put)
            if mask is not None:
                T.buffer_store(factor, _size(lanes, w, mask, (b, g, slot)), [i, 0])
                whole = _size(lanes, w, None, (b, g, slot))
                T.buffer_store(factor, whole / at_least(factor[i, 0], TINY), [i, 0])
        for start, width in panels(d_, lanes):

            def store(i: Any, d: Any, s: Any, start: int = start) -> None:
                value = s if mask is None else s * factor[i, 0]
                T.buffer_store(ot, value, [i, start + d])

            tile(
                lambda i, j: weight[i, j],
                lambda j, d, start=start: xp[bg, j, start + d],  # type: ignore[misc]
                s_,
                store,
                width=width,
            )
        with T.serial(0, ROWS) as i, T.If(first + i < r_), T.Then():
            vectors(d_, lanes, lambda d: T.buffer_store(out, ot[i, d], [b, g, first + i, d]))


def _slot_bias(lanes: int, w: Any, bias: Any, mask: Any, out: Any) -> None:
    b_, g_, _, r_ = (int(n) for n in out.shape)
    with T.parallel(0, b_ * g_ * r_) as n:
        bg, slot = n // r_, n % r_
        b, g = bg // g_, bg % g_
        seen, whole = scratch(1, 1), scratch(1, 1)
        T.buffer_store(seen, _size(lanes, w, mask, (b, g, slot)), [0, 0])
        T.buffer_store(whole, _size(lanes, w, None, (b, g, slot)), [0, 0])
        share = at_least(seen[0, 0], TINY) / at_least(whole[0, 0], TINY)
        value = load(bias, g, slot) + tirx.log(share)
        hidden = f32(float("-inf"))
        T.buffer_store(out, tirx.Select(seen[0, 0] > f32(0.0), value, hidden), [b, g, 0, slot])


_WRITERS: dict[str, Callable[..., None]] = {"pool": _pool, "slot_bias": _slot_bias}


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a pooling made by the kit, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    write = _WRITERS[facts["kernel"]]
    return tvm.s_tir.Schedule(build(func, lambda *args: write(target.lanes, *args)))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
