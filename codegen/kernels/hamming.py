"""Definitions of attention over packed codes: hashing, and sums of values with the sign of a bit.

Plain loops, the meaning that is counted; never run as they are. Codes are uint32 words, bit r of
word w is code bit 32 w + r, set for +1. A value takes the sign of a bit by an exclusive or with its
sign bit, so no product of a code and a value exists anywhere. Blocks start with ``hash_`` and
``ham_``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import wide
from codegen.kernels.tiles import load, store
from codegen.kernels.vector_math import f32

TINY = 1e-12
WORD = 32


def u32(value: int) -> Any:
    """A uint32 constant expression."""
    return tirx.const(value, "uint32")


def hash_codes(x: Any, anchors: Any, centre: Any, mix: Any, rate: Any) -> Any:
    """Rows x [B, H, T, D] as words [B, H, T, W].

    anchors [G, D, m], centre [G, m], mix [G, m, b], rate [G]; see passes/forms/_hash.py.
    """
    b_, h_, t_, d_ = (int(n) for n in x.shape)
    g_, m_, bits = int(anchors.shape[0]), int(anchors.shape[2]), int(mix.shape[2])
    share, dtype, rows = h_ // g_, str(x.dtype), (b_, h_, t_)
    d, e, f = (te.reduce_axis((0, d_), name=n) for n in ("d", "e", "f"))
    j = te.reduce_axis((0, m_), name="j")

    def value(*i: Any) -> Any:
        return wide(x(*i), dtype)

    length = te.compute(
        rows, lambda *i: te.sum(value(*i, d) * value(*i, d), axis=d), name="hash_length"
    )
    own = te.compute(
        (g_, m_), lambda g, a: te.sum(anchors[g, f, a] * anchors[g, f, a], axis=f), name="hash_own"
    )
    offset = te.compute((g_, m_), lambda g, a: (own[g, a] + f32(1.0)) * rate[g], name="hash_offset")
    twice = te.compute((g_,), lambda g: rate[g] + rate[g], name="hash_twice")
    scale = te.compute(
        rows,
        lambda b, h, i: (
            f32(1.0) / tirx.max(tirx.sqrt(length[b, h, i]), f32(TINY)) * twice[h // share]
        ),
        name="hash_scale",
    )
    dot = te.compute(
        (*rows, m_),
        lambda b, h, i, a: te.sum(value(b, h, i, e) * anchors[h // share, e, a], axis=e),
        name="hash_dot",
    )
    kernel = te.compute(
        (*rows, m_),
        lambda b, h, i, a: (
            tirx.exp(dot[b, h, i, a] * scale[b, h, i] - offset[h // share, a])
            - centre[h // share, a]
        ),
        name="hash_kernel",
    )
    u = te.compute(
        (*rows, bits),
        lambda b, h, i, r: te.sum(kernel[b, h, i, j] * mix[h // share, j, r], axis=j),
        name="hash_bits",
    )
    return pack(u, bits, lambda *i: f32(0.0))


def pack(u: Any, bits: int, level: Any) -> Any:
    """Words of the bits u [..., b] > level(*index)."""
    many = -(-bits // WORD)
    r = te.reduce_axis((0, bits if many == 1 else WORD), name="r")

    def word(*i: Any) -> Any:
        place = i[-1] * WORD + r if many > 1 else r
        sign = u(*i[:-1], place)
        if many > 1:
            # What fills the last word up is no bit: not above any level.
            sign = tirx.if_then_else(place < bits, sign, tirx.min_value("float32"))
        one = u32(1) << tirx.Cast("uint32", r)
        return te.sum(tirx.Select(sign > level(*i), one, u32(0)), axis=r)

    return te.compute((*u.shape[:-1], many), word, name="hash_words")


def flip(word: Any, r: Any) -> Any:
    """A word whose sign bit is set where bit r of `word` is not, all else 0: flips -1 codes."""
    return tirx.bitwise_not(word >> tirx.Cast("uint32", r)) << u32(WORD - 1)


def signed(value: Any, flipped: Any) -> Any:
    """`value` (float32) with its sign flipped by the sign bit of `flipped`."""
    if isinstance(value, tirx.FloatImm):  # CUDA code can not take the address of a constant
        bits = u32(int(np.float32(float(value.value)).view(np.uint32)))
    else:
        bits = tirx.reinterpret("uint32", value)
    return tirx.reinterpret("float32", bits ^ flipped)


def define(facts: dict[str, Any], cq: Any, ck: Any, v: Any, key_mask: Any = None) -> Any:
    """Bidirectional: words cq [B, H, T, W], ck [B, G, S, W], v [B, G, S, E], mask [B or 1, S]."""
    b_, h_, t_ = (int(n) for n in cq.shape[:3])
    g_, s_, e_ = (int(n) for n in v.shape[1:])
    bits, beta, share = int(facts["bits"]), float(facts["beta"]), h_ // g_
    flips_k = _flips(ck, bits, "ham_keys")
    flips_q = _flips(cq, bits, "ham_queries")
    one = key_mask is not None and int(key_mask.shape[0]) == 1
    dtype = str(v.dtype)

    def seen(b: Any, j: Any) -> Any:
        return key_mask[0 if one else b, j]

    def held(b: Any, g: Any, j: Any, e: Any) -> Any:
        return wide(v[b, g, j, e], dtype)

    def ones(b: Any, j: Any) -> Any:
        return f32(1.0) if key_mask is None else tirx.Cast("float32", seen(b, j))

    if key_mask is not None:
        held = te.compute(
            v.shape,
            lambda b, g, j, e: tirx.Select(seen(b, j), wide(v[b, g, j, e], dtype), f32(0.0)),
            name="ham_seen",
        )
    axes = [te.reduce_axis((0, s_), name=f"j{n}") for n in range(4)]
    state = te.compute(
        (b_, g_, bits, e_),
        lambda b, g, r, e: te.sum(
            signed(held(b, g, axes[0], e), flips_k[b, g, axes[0], r]), axis=axes[0]
        ),
        name="ham_state",
    )
    norm = te.compute(
        (b_, g_, bits),
        lambda b, g, r: te.sum(signed(ones(b, axes[1]), flips_k[b, g, axes[1], r]), axis=axes[1]),
        name="ham_norm",
    )
    r0, r1 = (te.reduce_axis((0, bits), name=n) for n in ("r0", "r1"))
    top = te.compute(
        (b_, h_, t_, e_),
        lambda b, h, i, e: te.sum(
            signed(state[b, h // share, r0, e], flips_q[b, h, i, r0]), axis=r0
        ),
        name="ham_read",
    )
    bottom = te.compute(
        (b_, h_, t_),
        lambda b, h, i: te.sum(signed(norm[b, h // share, r1], flips_q[b, h, i, r1]), axis=r1),
        name="ham_weight",
    )
    if facts["own"]:
        constant = te.compute(
            (b_, h_, t_, e_),
            lambda b, h, i, e: held(b, h // share, i, e) * f32(beta),
            name="ham_constant",
        )
    else:
        whole = te.compute(
            (b_, g_, e_),
            lambda b, g, e: te.sum(held(b, g, axes[2], e), axis=axes[2]),
            name="ham_sum",
        )
        constant = te.compute((b_, g_, e_), lambda *i: whole(*i) * f32(beta), name="ham_constant")

    def base(b: Any, h: Any, i: Any, e: Any) -> Any:
        return constant[b, h, i, e] if facts["own"] else constant[b, h // share, e]

    safe = _safe(facts, bottom, s_, key_mask, axes[3], one)
    return te.compute(
        (b_, h_, t_, e_),
        lambda b, h, i, e: ((top[b, h, i, e] + base(b, h, i, e)) / safe[b, h, i]).astype(dtype),
        name="ham_out",
    )


def _safe(facts: dict[str, Any], bottom: Any, keys: int, mask: Any, axis: Any, one: bool) -> Any:
    """The denominator, at least eps."""
    beta, eps = float(facts["beta"]), f32(float(facts["eps"]))
    if mask is None:
        return te.compute(
            bottom.shape, lambda *i: tirx.max(bottom(*i) + f32(beta * keys), eps), name="ham_safe"
        )
    number = te.compute(
        (int(mask.shape[0]),),
        lambda b: te.sum(tirx.Cast("float32", mask[b, axis]), axis=axis),
        name="ham_number",
    )
    constant = te.compute(number.shape, lambda b: number[b] * f32(beta), name="ham_count")
    return te.compute(
        bottom.shape,
        lambda b, h, i: tirx.max(bottom[b, h, i] + constant[0 if one else b], eps),
        name="ham_safe",
    )


def _flips(words: Any, bits: int, name: str) -> Any:
    return te.compute(
        (*words.shape[:3], bits),
        lambda b, h, i, r: flip(words[b, h, i, r // WORD], r % WORD if bits > WORD else r),
        name=name,
    )


def causal(facts: dict[str, Any], cq: Any, ck: Any, v: Any, mask_rows: int, dtype: str) -> Any:
    """The causal PrimFunc for shapes cq [B, H, T, W], ck [B, G, S, W], v [B, G, S, E].

    Query i sees keys j <= i + (S - T). One key after the other enters the state; the query it
    belongs to then reads it.
    """
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        args = [
            T.arg("cq", T.buffer(list(cq), "uint32")),
            T.arg("ck", T.buffer(list(ck), "uint32")),
            T.arg("v", T.buffer(list(v), dtype)),
        ]
        if mask_rows:
            args.append(T.arg("mask", T.buffer([mask_rows, v[2]], "bool")))
        args.append(T.arg("out", T.buffer([*cq[:3], v[3]], dtype)))
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            _Causal(facts, args).write()
    return ib.get()


class _Causal:
    def __init__(self, facts: dict[str, Any], args: list[Any]) -> None:
        self.bits, self.beta = int(facts["bits"]), float(facts["beta"])
        self.own, self.eps = bool(facts["own"]), float(facts["eps"])
        self.q, self.k, self.v, self.out = *args[:3], args[-1]
        self.mask: Any = args[3] if len(args) == 5 else None
        self.B, self.H, self.T = (int(n) for n in self.q.shape[:3])
        self.G, self.S, self.E = (int(n) for n in self.v.shape[1:])
        self.share, self.old = self.H // self.G, self.S - self.T
        alloc = T.sblock_alloc_buffer
        self.fq = alloc((self.B, self.H, self.T, self.bits), "uint32")
        self.fk = alloc((self.B, self.G, self.S, self.bits), "uint32")
        self.held = alloc((self.E,), "float32")
        self.state, self.norm = (
            alloc((self.bits, self.E), "float32"),
            alloc((self.bits,), "float32"),
        )
        self.total, self.number = alloc((self.E,), "float32"), alloc((1,), "float32")
        self.top, self.bottom = alloc((self.E,), "float32"), alloc((1,), "float32")

    def write(self) -> None:
        for words, flips in ((self.q, self.fq), (self.k, self.fk)):
            with T.grid(*(int(n) for n in flips.shape)) as (b, h, i, r):
                place = r % WORD if self.bits > WORD else r
                T.buffer_store(flips, flip(words[b, h, i, r // WORD], place), [b, h, i, r])
        blind = max(-self.old, 0)
        if blind:
            with T.grid(self.B, self.H, min(blind, self.T), self.E) as (b, h, i, e):
                store(self.out, [b, h, i, e], f32(0.0))
        with T.grid(self.B, self.G) as (b, g):
            self._clear()
            if self.old > 0:
                with T.serial(0, self.old) as j:
                    self._absorb(b, g, j)
            if blind < self.T:
                with T.serial(0, self.T - blind) as n:
                    self._absorb(b, g, n + max(self.old, 0))
                    with T.serial(0, self.share) as part:
                        self._read(b, g, g * self.share + part, n + blind)

    def _clear(self) -> None:
        zero = f32(0.0)
        T.buffer_store(self.number, zero, [0])
        with T.serial(0, self.E) as e:
            T.buffer_store(self.total, zero, [e])
        with T.serial(0, self.bits) as r:
            T.buffer_store(self.norm, zero, [r])
            with T.serial(0, self.E) as e:
                T.buffer_store(self.state, zero, [r, e])

    def _absorb(self, b: Any, g: Any, j: Any) -> None:
        one: Any = f32(1.0)
        with T.serial(0, self.E) as e:
            value = load(self.v, b, g, j, e)
            if self.mask is not None:
                value = tirx.Select(self._seen(b, j), value, f32(0.0))
            T.buffer_store(self.held, value, [e])
        if not self.own:
            with T.serial(0, self.E) as e:
                T.buffer_store(self.total, self.total[e] + self.held[e], [e])
        if self.mask is not None:
            one = tirx.Cast("float32", self._seen(b, j))
        T.buffer_store(self.number, self.number[0] + one, [0])
        with T.serial(0, self.bits) as r:
            sign = self.fk[b, g, j, r]
            T.buffer_store(self.norm, self.norm[r] + signed(one, sign), [r])
            with T.serial(0, self.E) as e:
                more = signed(self.held[e], sign)
                T.buffer_store(self.state, self.state[r, e] + more, [r, e])

    def _seen(self, b: Any, j: Any) -> Any:
        return self.mask[0 if int(self.mask.shape[0]) == 1 else b, j]

    def _read(self, b: Any, g: Any, h: Any, i: Any) -> None:
        top, bottom = self.top, self.bottom
        T.buffer_store(bottom, f32(0.0), [0])
        with T.serial(0, self.E) as e:
            T.buffer_store(top, f32(0.0), [e])
        with T.serial(0, self.bits) as r:
            sign = self.fq[b, h, i, r]
            T.buffer_store(bottom, bottom[0] + signed(self.norm[r], sign), [0])
            with T.serial(0, self.E) as e:
                T.buffer_store(top, top[e] + signed(self.state[r, e], sign), [e])
        safe = tirx.max(bottom[0] + self.number[0] * f32(self.beta), f32(self.eps))
        T.buffer_store(bottom, safe, [0])
        source = self.held if self.own else self.total
        with T.serial(0, self.E) as e:
            value = top[e] + source[e] * f32(self.beta)
            store(self.out, [b, h, i, e], value / bottom[0])
