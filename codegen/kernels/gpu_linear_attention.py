"""Causal linear attention in chunks whose sums do not depend on each other (TE).

Chunk c holds the queries c * 64 .. c * 64 + 63. A query reads the keys of its own chunk through
their scores, and all before through the chunk's state: the keys before the first chunk and the
sums of the earlier chunks. Letters as in passes/site.py; sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from codegen.kernels.attention import wide
from codegen.kernels.linear_attention import CHUNK
from codegen.kernels.vector_math import f32


def causal(func: Any, eps: float) -> Any:
    """The PrimFunc with the parameters of `func`: fq, fk, v, perhaps a key mask, and the output.

    fq [B, H, T, R], fk [B, G, S, R], v [B, G, S, E], mask [B or 1, S] bool.
    """
    buffers = list(func.params)[:-1]
    args = [
        te.placeholder([int(n) for n in b.shape], str(b.dtype), name=f"p{i}")
        for i, b in enumerate(buffers)
    ]
    return te.create_prim_func([*args, _Causal(eps, *args).output()])


@dataclass
class _Causal:
    eps: float
    fq: Any
    fk: Any
    v: Any
    mask: Any = None

    def __post_init__(self) -> None:
        self.B, self.H, self.T, self.R = (int(n) for n in self.fq.shape)
        self.G, self.S, self.E = (
            int(self.fk.shape[1]),
            int(self.fk.shape[2]),
            int(self.v.shape[3]),
        )
        self.group, self.dtype = self.H // self.G, str(self.fq.dtype)
        self.size = min(CHUNK, self.T)
        self.chunks = -(-self.T // self.size)
        self.old = self.S - self.T

    def output(self) -> Any:
        """The output [B, H, T, E]."""
        scores = self._scores()
        top = self._own(scores, self.E, self._value)
        bottom = self._own(scores, 1, lambda *_: f32(1.0))
        read = self._read(self._before(self.E, self._value), self.E)
        weight = self._read(self._before(1, lambda *_: f32(1.0)), 1)

        def value(b: Any, h: Any, i: Any, e: Any) -> Any:
            below = tirx.max(bottom[b, h, i, 0] + weight[b, h, i, 0], f32(self.eps))
            return ((top[b, h, i, e] + read[b, h, i, e]) / below).astype(self.dtype)

        return te.compute((self.B, self.H, self.T, self.E), value, name="causal_out")

    def _query(self, b: Any, h: Any, i: Any, r: Any) -> Any:
        return wide(self.fq[b, h, i, r], self.dtype)

    def _key(self, b: Any, g: Any, j: Any, r: Any) -> Any:
        value = wide(self.fk[b, g, j, r], self.dtype)
        if self.mask is None:
            return value
        row = 0 if int(self.mask.shape[0]) == 1 else b
        return value * tirx.Cast("float32", self.mask[row, j])

    def _value(self, b: Any, g: Any, j: Any, e: Any) -> Any:
        return wide(self.v[b, g, j, e], self.dtype)

    def _exists(self, j: Any, value: Any) -> Any:
        return tirx.if_then_else(tirx.all(j >= 0, j < self.S), value, f32(0.0))

    def _scores(self) -> Any:
        """[B, H, T, size]: the query with each key of its chunk, 0 for later ones."""
        r = te.reduce_axis((0, self.R), name="r")

        def term(b: Any, h: Any, i: Any, n: Any) -> Any:
            j = i // self.size * self.size + self.old + n
            product = self._query(b, h, i, r) * self._key(b, h // self.group, j, r)
            seen = tirx.all(n <= i % self.size, j >= 0, j < self.S)
            return te.sum(tirx.if_then_else(seen, product, f32(0.0)), axis=r)

        return te.compute((self.B, self.H, self.T, self.size), term, name="causal_scores")

    def _own(self, scores: Any, width: int, value: Any) -> Any:
        """[B, H, T, width]: the scores times the values of the query's own chunk."""
        n = te.reduce_axis((0, self.size), name="n")

        def term(b: Any, h: Any, i: Any, e: Any) -> Any:
            j = i // self.size * self.size + self.old + n
            product = scores[b, h, i, n] * value(b, h // self.group, j, e)
            seen = tirx.all(n <= i % self.size, j >= 0, j < self.S)
            return te.sum(tirx.if_then_else(seen, product, f32(0.0)), axis=n)

        return te.compute((self.B, self.H, self.T, width), term, name="causal_own")

    def _before(self, width: int, value: Any) -> Any:
        """[B, G, chunks, R, width]: the sum over all keys before each chunk."""
        n = te.reduce_axis((0, self.size), name="n")

        def term(b: Any, g: Any, c: Any, r: Any, e: Any) -> Any:
            j = c * self.size + self.old + n
            return te.sum(self._exists(j, self._key(b, g, j, r) * value(b, g, j, e)), axis=n)

        shape = (self.B, self.G, self.chunks, self.R, width)
        chunk = te.compute(shape, term, name="causal_chunk")
        first = self._first(width, value)
        p = te.reduce_axis((0, self.chunks), name="p")
        earlier = te.compute(
            shape,
            lambda b, g, c, r, e: te.sum(
                tirx.if_then_else(p < c, chunk[b, g, p, r, e], f32(0.0)), axis=p
            ),
            name="causal_earlier",
        )
        if first is None:
            return earlier
        return te.compute(
            shape,
            lambda b, g, c, r, e: earlier[b, g, c, r, e] + first[b, g, r, e],
            name="causal_before",
        )

    def _first(self, width: int, value: Any) -> Any | None:
        """[B, G, R, width]: the keys before the first chunk, None where there are none."""
        if self.old <= 0:
            return None
        j = te.reduce_axis((0, self.old), name="j")
        return te.compute(
            (self.B, self.G, self.R, width),
            lambda b, g, r, e: te.sum(self._key(b, g, j, r) * value(b, g, j, e), axis=j),
            name="causal_first",
        )

    def _read(self, state: Any, width: int) -> Any:
        """[B, H, T, width]: the query times the state of its chunk."""
        r = te.reduce_axis((0, self.R), name="r")
        return te.compute(
            (self.B, self.H, self.T, width),
            lambda b, h, i, e: te.sum(
                self._query(b, h, i, r) * state[b, h // self.group, i // self.size, r, e], axis=r
            ),
            name="causal_read",
        )
