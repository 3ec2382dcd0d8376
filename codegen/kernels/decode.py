"""Kernels of one decoding step: new tokens join a state that stays in memory between calls.

Each is written as it runs (vectors, registers, one task for each batch and key/value head); the
rule ``decode`` hands it on. The state's buffers are arguments that are read and written: a caller
uses `call_tir_inplace`. Letters as in passes/site.py; sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM
from codegen.kernels.tiles import imax, imin, load, reduce_row, scratch, store, tile, vectors
from codegen.kernels.vector_math import f32, vexp_weight

NAME = "decode"
ROWS = 4  # query heads that share the keys they read
WIDTH = 64  # values of one row held in registers
Tensor = tuple[Sequence[int], str]  # shape and type


def build_step(tensors: dict[str, Tensor], body: Any) -> Any:
    """The PrimFunc with buffers of these names, shapes and types and the statements of `body`."""
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        args = [T.arg(n, T.buffer([int(d) for d in s], t)) for n, (s, t) in tensors.items()]
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            body(*args)
    return ib.get()


def columns(n: int) -> list[tuple[int, int]]:
    """(start, width) of column panels covering n: whole ones, then the rest."""
    whole = [(s, WIDTH) for s in range(0, n - n % WIDTH, WIDTH)]
    return whole + ([(n - n % WIDTH, n % WIDTH)] if n % WIDTH else [])


def linear_step(eps: float, tensors: dict[str, Tensor], lanes: int) -> Any:
    """fq, fk, v, sum, norm -> out: the state takes each new token, then its queries read it.

    fq [B, H, T, R], fk [B, G, T, R], v [B, G, T, E], sum [B, G, R, E] and norm [B, G, R] float32;
    out [B, H, T, E] = fq sum / max(fq norm, eps).
    """

    def body(fq: Any, fk: Any, v: Any, state: Any, norm: Any, out: Any) -> None:
        (_, h_, t_, r_), (b_, g_, _, e_) = dims(fq), dims(v)
        group = h_ // g_
        with T.parallel(0, b_ * g_) as bg:
            b, g = bg // g_, bg % g_
            with T.serial(0, t_) as t:
                with T.serial(0, r_) as r:
                    add_to(state, [b, g, r], e_, lanes, load(fk, b, g, t, r), v, [b, g, t])
                add_to(norm, [b, g], r_, lanes, f32(1.0), fk, [b, g, t])
                for first in range(0, group, ROWS):
                    rows = min(ROWS, group - first)
                    head = g * group + first
                    _read(fq, state, norm, out, (b, g, head, t), rows, r_, e_, lanes, eps)

    return build_step(tensors, body)


def add_to(
    buffer: Any, at: list[Any], width: int, lanes: int, factor: Any, x: Any, index: list[Any]
) -> None:
    """buffer[at, :] += factor * x[index, :]."""
    held = scratch(1)
    T.buffer_store(held, factor, [0])
    vectors(
        width,
        lanes,
        lambda e: T.buffer_store(buffer, buffer[(*at, e)] + held[0] * load(x, *index, e), [*at, e]),
    )


def _read(
    fq: Any,
    state: Any,
    norm: Any,
    out: Any,
    at: tuple[Any, Any, Any, Any],
    rows: int,
    features: int,
    width: int,
    lanes: int,
    eps: float,
) -> None:
    b, g, head, t = at
    under = scratch(rows)
    for i in range(rows):  # unrolled here: every row has accumulators of its own
        total = reduce_row(
            features,
            lanes,
            lambda r, i=i: load(fq, b, head + i, t, r) * norm[b, g, r],  # type: ignore[misc]
            lambda x, y: x + y,
            0.0,
        )
        T.buffer_store(under, f32(1.0) / tirx.max(total, f32(eps)), [i])
    for start, panel in columns(width):
        tile(
            lambda i, r: load(fq, b, head + i, t, r),
            lambda r, e, s=start: state[b, g, r, s + e],  # type: ignore[misc]
            features,
            lambda i, e, x, s=start: store(  # type: ignore[misc]
                out, [b, head + i, t, s + e], x * under[i]
            ),
            rows=rows,
            width=panel,
        )


def rows_at(tensors: dict[str, Tensor]) -> Any:
    """table, position -> out: out [T, W] are the rows of table [N, W] from position [0, 0] on."""

    def body(table: Any, position: Any, out: Any) -> None:
        (n_, w_), t_ = dims(table), dims(out)[0]
        first = imax(0, imin(tirx.Cast("int32", position[0, 0]), n_ - t_))
        with T.serial(0, t_) as t, T.serial(0, w_) as w:
            T.buffer_store(out, table[first + t, w], [t, w])

    return build_step(tensors, body)


def code_signs(last: float, tensors: dict[str, Tensor]) -> Any:
    """words -> out: out [B, H, T, b + 1] is 1 where a bit of words [B, H, T, W] is set, else -1,
    and `last` behind them."""

    def body(words: Any, out: Any) -> None:
        b_, h_, t_, n_ = dims(out)
        with T.grid(b_, h_, t_) as (b, h, t):
            at = [b, h, t]

            def sign(r: Any) -> Any:
                bit = words[b, h, t, r // 32] >> tirx.Cast("uint32", r % 32)
                return tirx.Select(bit % tirx.const(2, "uint32") > 0, f32(1.0), f32(-1.0))

            with T.serial(0, n_ - 1) as r:
                T.buffer_store(out, sign(r), [*at, r])
            T.buffer_store(out, f32(last), [*at, n_ - 1])

    return build_step(tensors, body)


@dataclass(frozen=True)
class Cached:
    """How kept keys are attended to.

    `left`: a query sees so many tokens before its own, and the places are a ring; None: all, and
    token j stands at place j. `clip`: (zeta, gamma) of clip((zeta - gamma) softmax + gamma, 0, 1).
    """

    scale: float
    left: int | None = None
    clip: tuple[float, float] | None = None

    def place(self, at: Any, room: int) -> Any:
        """Where token `at` stands."""
        return at if self.left is None else at % room

    def used(self, at: Any, room: int) -> Any:
        """Places from the first one that may hold tokens up to `at`."""
        return at + 1 if self.left is None else imin(at + 1, room)

    def seen(self, place: Any, at: Any, room: int) -> Any:
        """Whether the query of token `at` sees what stands at `place`."""
        if self.left is None:
            return place <= at
        back = at % room - place  # how many tokens ago it was written, less a turn of the ring
        ago = tirx.Select(back < 0, back + room, back)
        return ago <= imin(at, self.left)


def attention_step(facts: Cached, tensors: dict[str, Tensor], lanes: int) -> Any:
    """q, k, v, position, keys, values -> out: softmax over the keys each query sees.

    q [B, H, T, D], k [B, G, T, D], v [B, G, T, E], position [B, T] int64 (the first is read),
    keys [B, G, N, D, block], values [B, G, N * block, E]; out [B, H, T, E]. The loops follow the
    position; nothing behind it is used. Without a window the caller sees to position + T <=
    N * block; a ring holds at least left + 1 places.
    """

    def body(q: Any, k: Any, v: Any, position: Any, keys: Any, values: Any, out: Any) -> None:
        (b_, h_, t_, _), g_ = dims(q), dims(k)[1]
        group, room = h_ // g_, dims(values)[2]
        first = imax(0, tirx.Cast("int32", position[0, 0]))
        if facts.left is None:
            first = imin(first, room - t_)  # never outside the buffers
        with T.parallel(0, b_ * g_) as bg:
            b, g = bg // g_, bg % g_
            with T.serial(0, t_) as t:
                _take(k, v, keys, values, (b, g, t), facts.place(first + t, room), lanes)
                for start in range(0, group, ROWS):
                    rows = min(ROWS, group - start)
                    head = g * group + start
                    _attend(q, keys, values, out, (b, g, head, t), first + t, rows, facts, lanes)

    return build_step(tensors, body)


def _take(
    k: Any, v: Any, keys: Any, values: Any, token: tuple[Any, Any, Any], place: Any, lanes: int
) -> None:
    """Key and value of a new token to their place."""
    (b, g, t), (channels, block) = token, dims(keys)[3:]
    with T.serial(0, channels) as d:
        T.buffer_store(keys, k[b, g, t, d], [b, g, place // block, d, place % block])
    vectors(dims(v)[3], lanes, lambda e: T.buffer_store(values, v[b, g, t, e], [b, g, place, e]))


def _attend(
    q: Any,
    keys: Any,
    values: Any,
    out: Any,
    row: tuple[Any, Any, Any, Any],
    at: Any,
    rows: int,
    facts: Cached,
    lanes: int,
) -> None:
    b, g, head, t = row
    (_, _, number, channels, block), (_, _, room, width) = dims(keys), dims(values)
    query, scores = scratch(rows, channels), scratch(rows, number * block)
    for i in range(rows):
        vectors(
            channels,
            lanes,
            lambda d, i=i: T.buffer_store(  # type: ignore[misc]
                query, load(q, b, head + i, t, d) * f32(facts.scale), [i, d]
            ),
        )
    used = facts.used(at, room)
    blocks = (used + block - 1) // block
    with T.serial(0, blocks) as n:
        tile(
            lambda i, d: query[i, d],
            lambda d, j: load(keys, b, g, n, d, j),
            channels,
            lambda i, j, x: T.buffer_store(
                scores,
                tirx.Select(facts.seen(n * block + j, at, room), x, f32(MINIMUM)),
                [i, n * block + j],
            ),
            rows=rows,
            width=block,
        )
    under = scratch(rows)
    for i in range(rows):
        _softmax(scores, i, blocks * (block // lanes), lanes, under)
        if facts.clip is not None:
            _clip(scores, i, blocks * (block // lanes), lanes, under, facts.clip)
    for start, panel in columns(width):
        tile(
            lambda i, j: scores[i, j],
            lambda j, e, s=start: load(values, b, g, j, s + e),  # type: ignore[misc]
            used,
            lambda i, e, x, s=start: store(  # type: ignore[misc]
                out, [b, head + i, t, s + e], x * under[i]
            ),
            rows=rows,
            width=panel,
        )


def _softmax(scores: Any, i: int, steps: Any, lanes: int, under: Any) -> None:
    """scores[i] to exp(score - largest) over `steps` vectors, under[i] to 1 / their sum."""
    top = scratch(1)
    largest = reduce_row(steps, lanes, lambda j: scores[i, j], tirx.max, MINIMUM)
    T.buffer_store(top, largest, [0])
    with T.serial(0, steps) as o, T.vectorized(0, lanes) as j:
        value = vexp_weight(scores[i, o * lanes + j] - top[0])
        T.buffer_store(scores, value, [i, o * lanes + j])
    total = reduce_row(steps, lanes, lambda j: scores[i, j], lambda x, y: x + y, 0.0)
    T.buffer_store(under, f32(1.0) / total, [i])


def _clip(
    scores: Any, i: int, steps: Any, lanes: int, under: Any, limits: tuple[float, float]
) -> None:
    """scores[i] times under[i] stretched and clipped, under[i] to 1; what is hidden stays 0."""
    zeta, gamma = limits
    with T.serial(0, steps) as o, T.vectorized(0, lanes) as j:
        soft = scores[i, o * lanes + j] * under[i]
        wide = soft * f32(zeta - gamma) + f32(gamma)
        held = tirx.min(tirx.max(wide, f32(0.0)), f32(1.0))
        T.buffer_store(scores, held, [i, o * lanes + j])
    T.buffer_store(under, f32(1.0), [i])


def dims(buffer: Any) -> tuple[int, ...]:
    """The buffer's sizes as numbers."""
    return tuple(int(n) for n in buffer.shape)
