"""Rule ``blocks``: choosing and gathering blocks of keys, a block of queries a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.blocks import HIDDEN, log_counts
from codegen.kernels.landmarks import one_of
from codegen.kernels.tiles import build, imax, imin, load, reduce_row, scratch, store, vectors
from codegen.kernels.vector_math import f32
from codegen.rule import Rule
from codegen.target import Target

NAME = "blocks"


def _log_counts(facts: dict[str, Any], lanes: int, mask: Any, out: Any) -> None:
    log_counts(int(facts["block"]), mask, out)


def _choose(facts: dict[str, Any], lanes: int, q: Any, k: Any, counts: Any, out: Any) -> None:
    b_, h_, n_, d_ = (int(n) for n in q.shape)
    group = h_ // int(k.shape[1])
    with T.parallel(0, b_ * h_ * n_) as task:
        b, h, u = task // (h_ * n_), task // n_ % h_, task % n_
        score, peak = scratch(1, n_), scratch(1, 1)
        at = T.sblock_alloc_buffer((1,), "int32")
        with T.serial(0, n_) as n:
            dot = reduce_row(
                d_,
                lanes,
                lambda d: load(q, b, h, u, d) * load(k, b, h // group, n, d),
                lambda x, y: x + y,
                0.0,
            )
            value = dot * f32(facts["scale"]) + one_of(counts, b, n)
            T.buffer_store(score, tirx.Select(n == u, f32(HIDDEN), value), [0, n])
        T.buffer_store(out, u, [b, h, u, 0])
        with T.serial(0, int(out.shape[3]) - 1) as place:
            T.buffer_store(peak, f32(HIDDEN), [0, 0])
            T.buffer_store(at, tirx.const(-1, "int32"), [0])
            with T.serial(0, n_) as n, T.If(score[0, n] > peak[0, 0]), T.Then():
                T.buffer_store(at, n, [0])
                T.buffer_store(peak, score[0, n], [0, 0])
            T.buffer_store(out, at[0], [b, h, u, place + 1])
            with T.If(at[0] >= 0), T.Then():
                T.buffer_store(score, f32(HIDDEN), [0, at[0]])


def _bias(facts: dict[str, Any], lanes: int, chosen: Any, counts: Any, *rest: Any) -> None:
    mask, out = (rest[0] if len(rest) == 2 else None), rest[-1]
    block, keys = int(facts["block"]), int(facts["keys"])
    b_, h_, n_, p_ = (int(n) for n in chosen.shape)
    with T.parallel(0, b_ * h_ * n_) as row:
        b, h, u = row // (h_ * n_), row // n_ % h_, row % n_
        with T.serial(0, p_) as p, T.serial(0, block) as c:
            n = chosen[b, h, u, p]
            j = n * block + c
            seen = tirx.all(n >= 0, j < keys)
            if mask is not None:
                seen = tirx.all(seen, one_of(mask, b, imax(imin(j, keys - 1), 0)))
            value = tirx.Select(seen, f32(0.0), f32(HIDDEN))
            T.buffer_store(out, value, [row, 0, 0, p * block + c])
        vectors(
            n_,
            lanes,
            lambda n: T.buffer_store(out, one_of(counts, b, n), [row, 0, 0, p_ * block + n]),
        )
        with T.serial(0, p_) as p, T.If(chosen[b, h, u, p] >= 0), T.Then():
            T.buffer_store(out, f32(HIDDEN), [row, 0, 0, p_ * block + chosen[b, h, u, p]])


def _gather(facts: dict[str, Any], lanes: int, x: Any, means: Any, chosen: Any, out: Any) -> None:
    block, (b_, h_, n_, p_) = int(facts["block"]), (int(n) for n in chosen.shape)
    keys, group, width = int(x.shape[2]), h_ // int(x.shape[1]), int(x.shape[3])
    with T.parallel(0, b_ * h_ * n_) as row:
        b, h, u = row // (h_ * n_), row // n_ % h_, row % n_
        with T.serial(0, p_) as p, T.serial(0, block) as c:

            def take(d: Any) -> None:
                j = imax(imin(chosen[b, h, u, p] * block + c, keys - 1), 0)
                store(out, [row, 0, p * block + c, d], load(x, b, h // group, j, d))

            vectors(width, lanes, take)
        with T.serial(0, n_) as n:

            def mean(d: Any) -> None:
                store(out, [row, 0, p_ * block + n, d], load(means, b, h // group, n, d))

            vectors(width, lanes, mean)


_WRITERS: dict[str, Callable[..., None]] = {
    "log_counts": _log_counts,
    "choose": _choose,
    "bias": _bias,
    "gather": _gather,
}


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of one made by the kit's block calls, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    write = _WRITERS[facts["kernel"]]
    return tvm.s_tir.Schedule(build(func, lambda *args: write(facts, target.lanes, *args)))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
