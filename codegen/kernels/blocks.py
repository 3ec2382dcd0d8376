"""Definitions for attention to chosen blocks of keys; counted, never run as they are.

Tokens lie in N blocks of C neighbours. A block of queries sees some blocks of keys one by one, its
own first, and every other block as one key, the mean of its visible ones. For each (b, h, block)
the keys are gathered: places blocks of C, then the N means. The schedule is
codegen/schedules/blocks.py.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.landmarks import one_of
from codegen.kernels.tiles import load, store
from codegen.kernels.vector_math import f32

HIDDEN = float("-inf")


def log_counts(block: int, mask: Any, out: Any) -> None:
    """The log of how many keys of each block are visible, -inf for none: [B or 1, N]."""
    rows, keys = (int(n) for n in mask.shape)
    count = T.sblock_alloc_buffer((1,), "float32")
    with T.grid(rows, int(out.shape[1])) as (b, n):
        T.buffer_store(count, f32(0.0), [0])
        with T.serial(0, block) as c:
            j = n * block + c
            seen = tirx.all(j < keys, mask[b, tirx.min(j, keys - 1)])
            T.buffer_store(count, count[0] + tirx.Cast("float32", seen), [0])
        some = tirx.log(tirx.max(count[0], f32(1.0)))
        T.buffer_store(out, tirx.Select(count[0] > f32(0.0), some, f32(HIDDEN)), [b, n])


def choose(scale: float, q: Any, k: Any, counts: Any, out: Any) -> None:
    """The best blocks for each block of queries, its own first, -1 for none: int32 [B, H, N, P].

    q [B, H, N, D] and k [B, G, N, D] are means, a block's score is scale q.k + its log count.
    """
    b_, h_, n_, d_ = (int(n) for n in q.shape)
    group = h_ // int(k.shape[1])
    score, dot, peak = (T.sblock_alloc_buffer((n,), "float32") for n in (n_, 1, 1))
    at = T.sblock_alloc_buffer((1,), "int32")
    with T.grid(b_, h_, n_) as (b, h, u):
        with T.serial(0, n_) as n:
            T.buffer_store(dot, f32(0.0), [0])
            with T.serial(0, d_) as d:
                value = load(q, b, h, u, d) * load(k, b, h // group, n, d)
                T.buffer_store(dot, dot[0] + value, [0])
            value = dot[0] * f32(scale) + one_of(counts, b, n)
            T.buffer_store(score, tirx.if_then_else(n == u, f32(HIDDEN), value), [n])
        T.buffer_store(out, u, [b, h, u, 0])
        with T.serial(0, int(out.shape[3]) - 1) as place:
            T.buffer_store(peak, f32(HIDDEN), [0])
            T.buffer_store(at, tirx.const(-1, "int32"), [0])
            with T.serial(0, n_) as n:
                T.buffer_store(at, tirx.Select(score[n] > peak[0], n, at[0]), [0])
                T.buffer_store(peak, tirx.max(peak[0], score[n]), [0])
            T.buffer_store(out, at[0], [b, h, u, place + 1])
            with T.If(at[0] >= 0), T.Then():
                T.buffer_store(score, f32(HIDDEN), [at[0]])


def bias(block: int, keys: int, chosen: Any, counts: Any, *rest: Any) -> None:
    """What is added to the logits of gathered keys: [B H N, 1, 1, P C + N], 0, -inf or log counts.

    `keys` is S; perhaps a key mask [B or 1, S] comes before the output.
    """
    mask, out = (rest[0] if len(rest) == 2 else None), rest[-1]
    b_, h_, n_, p_ = (int(n) for n in chosen.shape)
    with T.grid(b_, h_, n_) as (b, h, u):
        row = (b * h_ + h) * n_ + u
        with T.grid(p_, block) as (p, c):
            n = chosen[b, h, u, p]
            j = n * block + c
            seen = tirx.all(n >= 0, j < keys)
            if mask is not None:
                inside = tirx.max(tirx.min(j, keys - 1), 0)
                seen = tirx.all(seen, one_of(mask, b, inside))
            value = tirx.if_then_else(seen, f32(0.0), f32(HIDDEN))
            T.buffer_store(out, value, [row, 0, 0, p * block + c])
        with T.serial(0, n_) as n:
            T.buffer_store(out, one_of(counts, b, n), [row, 0, 0, p_ * block + n])
        with T.serial(0, p_) as p, T.If(chosen[b, h, u, p] >= 0), T.Then():
            at = p_ * block + chosen[b, h, u, p]
            T.buffer_store(out, f32(HIDDEN), [row, 0, 0, at])


def gather(block: int, x: Any, means: Any, chosen: Any, out: Any) -> None:
    """The gathered rows of x [B, G, S, X] and of its means [B, G, N, X]: [B H N, 1, P C + N, X]."""
    _, h_, n_, p_ = (int(n) for n in chosen.shape)
    keys, group = int(x.shape[2]), h_ // int(x.shape[1])
    with T.grid(*(int(n) for n in out.shape)) as (row, _, place, d):
        b, h, u = row // (h_ * n_), row // n_ % h_, row % n_
        n = chosen[b, h, u, tirx.min(place // block, p_ - 1)]
        j = tirx.max(tirx.min(n * block + place % block, keys - 1), 0)
        own = load(x, b, h // group, j, d)
        mean = load(means, b, h // group, tirx.max(place - p_ * block, 0), d)
        store(out, [row, 0, place, d], tirx.if_then_else(place < p_ * block, own, mean))
