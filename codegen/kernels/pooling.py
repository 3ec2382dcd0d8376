"""Definition of tokens pooled by weights into slots; counted, never run as it is.

Weights w [G, r, S] of keys; with a key mask the coverage of a slot is sum |w| over its visible keys
over sum |w| over all. The schedule is codegen/schedules/pooling.py.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.landmarks import one_of
from codegen.kernels.tiles import load
from codegen.kernels.vector_math import f32

TINY = 1e-30


def pool(w: Any, x: Any, *rest: Any) -> None:
    """sum_j w_lj x_j over the visible keys and the slot's coverage: x [B, G, S, D] -> [B, G, r, D].

    0 in a slot without a visible key. Perhaps a key mask [B or 1, S] comes before the output.
    """
    mask, out = (rest[0] if len(rest) == 2 else None), rest[-1]
    b_, g_, s_, d_ = (int(n) for n in x.shape)
    weight, sums = _new(s_), _new(2)
    with T.grid(b_, g_, int(w.shape[1])) as (b, g, slot):
        if mask is not None:
            covered(w, mask, (b, g, slot), sums)
            T.buffer_store(sums, sums[1] / tirx.max(sums[0], f32(TINY)), [0])
        with T.serial(0, s_) as j:
            value = load(w, g, slot, j)
            if mask is not None:
                value = tirx.Select(one_of(mask, b, j), value, f32(0.0))
            T.buffer_store(weight, value, [j])
        with T.serial(0, d_) as d:
            total = _new(1)
            T.buffer_store(total, f32(0.0), [0])
            with T.serial(0, s_) as j:
                T.buffer_store(total, total[0] + weight[j] * load(x, b, g, j, d), [0])
            value = total[0] if mask is None else total[0] * sums[0]
            T.buffer_store(out, value, [b, g, slot, d])


def slot_bias(w: Any, bias: Any, mask: Any, out: Any) -> None:
    """bias [G, r] plus the log of each slot's coverage, -inf for none: [B, G, 1, r]."""
    b_, g_, _, r_ = (int(n) for n in out.shape)
    sums = _new(2)
    with T.grid(b_, g_, r_) as (b, g, slot):
        covered(w, mask, (b, g, slot), sums)
        share = tirx.max(sums[0], f32(TINY)) / tirx.max(sums[1], f32(TINY))
        some = load(bias, g, slot) + tirx.log(share)
        # A comparison of floats counts as a maximum.
        value = tirx.Select(sums[0] > f32(0.0), some, f32(float("-inf")))
        T.buffer_store(out, value, [b, g, 0, slot])


def covered(w: Any, mask: Any, at: tuple[Any, Any, Any], sums: Any) -> None:
    """sums[0] = sum |w| over the visible keys of slot `at` (b, g, slot), sums[1] over all."""
    b, g, slot = at
    for n in (0, 1):
        T.buffer_store(sums, f32(0.0), [n])
    with T.serial(0, int(w.shape[2])) as j:
        size = tirx.abs(load(w, g, slot, j))
        T.buffer_store(sums, sums[1] + size, [1])
        seen = tirx.Select(one_of(mask, b, j), tirx.abs(load(w, g, slot, j)), f32(0.0))
        T.buffer_store(sums, sums[0] + seen, [0])


def _new(n: int) -> Any:
    return T.sblock_alloc_buffer((n,), "float32")
