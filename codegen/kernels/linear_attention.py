"""Definitions of linear attention: plain loops, the meaning that is counted; never run as they are.

Bidirectional is TE (blocks ``lin_``). Causal carries a state from chunk to chunk, which TE can
not say, so its PrimFunc is written with the IR builder. Both have float32 sums.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import arranged, wide
from codegen.kernels.tiles import load, store
from codegen.kernels.vector_math import f32

CHUNK = 64


def define(
    eps: float, fq: Any, fk: Any, v: Any, key_mask: Any = None, *, tokens_first: bool = False
) -> Any:
    """Bidirectional: fq [B, H, T, R], fk [B, G, S, R], v [B, G, S, E], mask [B or 1, S] bool.

    The result [B, H, T, E] (or [B, T, H * E] with `tokens_first`) has v's dtype.
    """
    b_, h_, t_, r_ = (int(n) for n in fq.shape)
    g_, s_, e_ = int(fk.shape[1]), int(fk.shape[2]), int(v.shape[3])
    group, dtype, known = h_ // g_, str(v.dtype), str(fk.dtype)
    keys = fk
    if key_mask is not None:
        one = int(key_mask.shape[0]) == 1
        keys = te.compute(
            fk.shape,
            lambda b, g, j, r: (
                wide(fk[b, g, j, r], known) * tirx.Cast("float32", key_mask[0 if one else b, j])
            ),
            name="lin_keys",
        )
    j0, j1 = te.reduce_axis((0, s_), name="j0"), te.reduce_axis((0, s_), name="j1")
    r0, r1 = te.reduce_axis((0, r_), name="r0"), te.reduce_axis((0, r_), name="r1")
    kind = str(keys.dtype)
    state = te.compute(
        (b_, g_, r_, e_),
        lambda b, g, r, e: te.sum(
            wide(keys[b, g, j0, r], kind) * wide(v[b, g, j0, e], dtype), axis=j0
        ),
        name="lin_state",
    )
    z = te.compute(
        (b_, g_, r_),
        lambda b, g, r: te.sum(wide(keys[b, g, j1, r], kind), axis=j1),
        name="lin_norm",
    )
    top = te.compute(
        (b_, h_, t_, e_),
        lambda b, h, i, e: te.sum(
            wide(fq[b, h, i, r0], known) * state[b, h // group, r0, e], axis=r0
        ),
        name="lin_read",
    )
    bottom = te.compute(
        (b_, h_, t_),
        lambda b, h, i: te.sum(wide(fq[b, h, i, r1], known) * z[b, h // group, r1], axis=r1),
        name="lin_weight",
    )
    safe = te.compute((b_, h_, t_), lambda *i: tirx.max(bottom(*i), f32(eps)), name="lin_safe")
    return arranged(
        (b_, h_, t_, e_),
        lambda b, h, i, e: (top[b, h, i, e] / safe[b, h, i]).astype(dtype),
        "lin_out",
        tokens_first,
    )


def causal(
    eps: float, fq: Any, fk: Any, v: Any, mask_rows: int = 0, *, dtype: str = "float32"
) -> Any:
    """The causal PrimFunc for shapes fq [B, H, T, R], fk [B, G, S, R], v [B, G, S, E].

    `mask_rows` is the first size of the key mask (0: no mask). Query i sees keys
    j <= i + (S - T). Keys before the first query enter the state alone; then come chunks of
    min(64, T) tokens, the last one filled up with zeros.
    """
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        q_ = T.arg("fq", T.buffer(list(fq), dtype))
        k_ = T.arg("fk", T.buffer(list(fk), dtype))
        v_ = T.arg("v", T.buffer(list(v), dtype))
        m_ = T.arg("mask", T.buffer([mask_rows, fk[2]], "bool")) if mask_rows else None
        out = T.arg("out", T.buffer([*fq[:3], v[3]], dtype))
        T.func_attr({"tirx.noalias": True})
        write_causal(eps, q_, k_, v_, m_, out)
    return ib.get()


def write_causal(eps: float, q: Any, k: Any, v: Any, mask: Any, out: Any) -> None:
    """Emit the causal definition for features q and k into the PrimFunc being built."""
    _Causal(eps, q, k, v, mask, out).write()


class _Causal:
    def __init__(self, eps: float, q: Any, k: Any, v: Any, mask: Any, out: Any) -> None:
        self.eps, self.q, self.k, self.v, self.mask, self.out = eps, q, k, v, mask, out
        self.B, self.H, self.T, self.R = (int(n) for n in q.shape)
        self.G, self.S, self.E = int(k.shape[1]), int(k.shape[2]), int(v.shape[3])
        self.size = min(CHUNK, self.T)
        self.chunks = -(-self.T // self.size)
        self.old = self.S - self.T
        self.keys = T.sblock_alloc_buffer((self.B, self.G, self.S, self.R), "float32")
        self.state = T.sblock_alloc_buffer((self.R, self.E), "float32")
        self.norm = T.sblock_alloc_buffer((self.R,), "float32")
        whole = (self.B, self.H, self.chunks * self.size)
        self.top = T.sblock_alloc_buffer((*whole, self.E), "float32")
        self.bottom = T.sblock_alloc_buffer(whole, "float32")

    def write(self) -> None:
        """Emit the definition."""
        with T.grid(self.B, self.G, self.S, self.R) as (b, g, j, r):
            value = load(self.k, b, g, j, r)
            if self.mask is not None:
                row = 0 if int(self.mask.shape[0]) == 1 else b
                value = value * tirx.Cast("float32", self.mask[row, j])
            T.buffer_store(self.keys, value, [b, g, j, r])
        with T.grid(self.B, self.G) as (b, g):
            with T.serial(0, self.R) as r:
                T.buffer_store(self.norm, f32(0.0), [r])
                with T.serial(0, self.E) as e:
                    T.buffer_store(self.state, f32(0.0), [r, e])
            if self.old > 0:
                self._absorb(b, g, 0, self.old)
            with T.serial(0, self.chunks) as c:
                with T.serial(0, self.H // self.G) as part:
                    self._read(b, g, g * (self.H // self.G) + part, c * self.size)
                self._absorb(b, g, c * self.size + self.old, self.size)
        with T.grid(self.B, self.H, self.T) as (b, h, i):
            safe = tirx.max(self.bottom[b, h, i], f32(self.eps))
            T.buffer_store(self.bottom, safe, [b, h, i])
            with T.serial(0, self.E) as e:
                value = self.top[b, h, i, e] / self.bottom[b, h, i]
                store(self.out, [b, h, i, e], value)

    def _at(self, token: Any, value: Any, limit: int, low: Any = 0) -> Any:
        return tirx.if_then_else(tirx.all(token >= low, token < limit), value, f32(0.0))

    def _key(self, b: Any, g: Any, j: Any, r: Any) -> Any:
        return self._at(j, self.keys[b, g, j, r], self.S)

    def _absorb(self, b: Any, g: Any, start: Any, number: int) -> None:
        """Add `number` keys from `start` to the state and its normaliser."""
        state, norm = self.state, self.norm
        with T.serial(0, number) as n, T.serial(0, self.R) as r:
            T.buffer_store(norm, norm[r] + self._key(b, g, start + n, r), [r])
            with T.serial(0, self.E) as e:
                value = self._at(start + n, load(self.v, b, g, start + n, e), self.S)
                T.buffer_store(state, state[r, e] + self._key(b, g, start + n, r) * value, [r, e])

    def _read(self, b: Any, g: Any, h: Any, start: Any) -> None:
        """The outputs of one chunk of queries: inside it by scores, before it by the state."""
        scores = T.sblock_alloc_buffer((self.size,), "float32")
        top, bottom = self.top, self.bottom
        with T.serial(0, self.size) as i:
            token = start + i

            def query(r: Any) -> Any:
                return self._at(token, load(self.q, b, h, token, r), self.T)

            def add(e: Any, value: Any) -> None:
                T.buffer_store(top, top[b, h, token, e] + value, [b, h, token, e])

            T.buffer_store(bottom, f32(0.0), [b, h, token])
            with T.serial(0, self.E) as e:
                T.buffer_store(top, f32(0.0), [b, h, token, e])
            with T.serial(0, self.size) as j:
                T.buffer_store(scores, f32(0.0), [j])
                key = start + self.old + j
                with T.serial(0, self.R) as r:
                    T.buffer_store(scores, scores[j] + query(r) * self._key(b, g, key, r), [j])
                T.buffer_store(scores, tirx.Select(j <= i, scores[j], f32(0.0)), [j])
                T.buffer_store(bottom, bottom[b, h, token] + scores[j], [b, h, token])
                with T.serial(0, self.E) as e:
                    value = self._at(key, load(self.v, b, g, key, e), self.S)
                    add(e, scores[j] * value)
            with T.serial(0, self.R) as r:
                seen = bottom[b, h, token] + query(r) * self.norm[r]
                T.buffer_store(bottom, seen, [b, h, token])
                with T.serial(0, self.E) as e:
                    add(e, query(r) * self.state[r, e])
