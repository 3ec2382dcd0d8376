"""Causal attention over codes in chunks whose sums do not depend on each other (TE), for GPUs.

Chunk c holds the queries c * 64 .. c * 64 + 63. A query meets the keys of its own chunk pair by
pair (weight b + beta - 2 popcount(q xor k)), and all before through the chunk's state, sums of
values under the signs of the keys' bits. Every stage is parallel. Letters and words as in
codegen/kernels/hamming.py.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from codegen.kernels.attention import wide
from codegen.kernels.hamming import WORD, flip, signed
from codegen.kernels.linear_attention import CHUNK
from codegen.kernels.vector_math import f32


def causal(func: Any, facts: dict[str, Any]) -> Any:
    """The PrimFunc with the parameters of `func`: cq, ck, v, perhaps a key mask, and the output.

    cq [B, H, T, W], ck [B, G, S, W] uint32, v [B, G, S, E], mask [B or 1, S] bool.
    """
    args = [
        te.placeholder([int(n) for n in b.shape], str(b.dtype), name=f"p{i}")
        for i, b in enumerate(list(func.params)[:-1])
    ]
    return te.create_prim_func([*args, _Causal(facts, *args).output()])


class _Causal:
    def __init__(self, facts: dict[str, Any], cq: Any, ck: Any, v: Any, mask: Any = None) -> None:
        self.bits, self.beta = int(facts["bits"]), float(facts["beta"])
        self.own, self.eps = bool(facts["own"]), float(facts["eps"])
        self.cq, self.ck, self.v, self.mask = cq, ck, v, mask
        self.B, self.H, self.T, self.words = (int(n) for n in cq.shape)
        self.G, self.S, self.E = (int(n) for n in v.shape[1:])
        self.share, self.old, self.dtype = self.H // self.G, self.S - self.T, str(v.dtype)
        self.size = min(CHUNK, self.T)
        self.chunks = -(-self.T // self.size)

    def output(self) -> Any:
        """The output [B, H, T, E]."""
        inner = self._inner()
        top = self._sum(inner, self.E, self._held, 0.0 if self.own else self.beta, "values")
        bottom = self._sum(inner, 1, self._one, self.beta, "weights")

        def value(b: Any, h: Any, i: Any, e: Any) -> Any:
            above = top(b, h, i, e)
            if self.own:
                j = i + self.old
                own = tirx.if_then_else(j >= 0, self._held(b, h // self.share, j, e), f32(0.0))
                above = above + own * f32(self.beta)
            below = tirx.max(bottom(b, h, i, 0), f32(self.eps))
            return (above / below).astype(self.dtype)

        return te.compute((self.B, self.H, self.T, self.E), value, name="hamc_out")

    def _held(self, b: Any, g: Any, j: Any, e: Any) -> Any:
        held = wide(self.v[b, g, j, e], self.dtype)
        return held if self.mask is None else tirx.Select(self._seen(b, j), held, f32(0.0))

    def _one(self, b: Any, g: Any, j: Any, e: Any) -> Any:
        return f32(1.0) if self.mask is None else tirx.Cast("float32", self._seen(b, j))

    def _seen(self, b: Any, j: Any) -> Any:
        return self.mask[0 if int(self.mask.shape[0]) == 1 else b, j]

    def _inner(self) -> Any:
        """b - 2 * distance of a query and the n-th key of its chunk, [B, H, T, size]."""
        w = te.reduce_axis((0, self.words), name="w")

        def bits(b: Any, h: Any, i: Any, n: Any) -> Any:
            j = i // self.size * self.size + self.old + n
            different = self.cq[b, h, i, w] ^ self.ck[b, h // self.share, j, w]
            inside = tirx.all(j >= 0, j < self.S)
            return te.sum(
                tirx.if_then_else(inside, tirx.popcount(different), tirx.const(0, "uint32")), axis=w
            )

        shape = (self.B, self.H, self.T, self.size)
        distance = te.compute(shape, bits, name="hamc_distance")
        return lambda *i: f32(self.bits) - tirx.Cast("float32", distance(*i)) * f32(2.0)

    def _sum(self, inner: Any, width: int, value: Any, beta: float, name: str) -> Any:
        """sum over visible keys of (inner + beta) value, as a function of (b, h, i, e)."""
        n = te.reduce_axis((0, self.size), name="n")

        def term(b: Any, h: Any, i: Any, e: Any) -> Any:
            j = i // self.size * self.size + self.old + n
            seen = tirx.all(n <= i % self.size, j >= 0, j < self.S)
            more = (inner(b, h, i, n) + f32(beta)) * value(b, h // self.share, j, e)
            return te.sum(tirx.if_then_else(seen, more, f32(0.0)), axis=n)

        near = te.compute((self.B, self.H, self.T, width), term, name=f"hamc_near_{name}")
        state, r = self._before(width, value, name), te.reduce_axis((0, self.bits), name="r")

        def read(b: Any, h: Any, i: Any, e: Any) -> Any:
            held = state(b, h // self.share, i // self.size, r, e)
            return te.sum(signed(held, self._flip(self.cq, b, h, i, r)), axis=r)

        far = te.compute((self.B, self.H, self.T, width), read, name=f"hamc_far_{name}")
        if not beta:
            return lambda *i: near(*i) + far(*i)
        whole = self._before(width, value, f"{name}_all", signs=False)
        return lambda b, h, i, e: (
            near(b, h, i, e)
            + far(b, h, i, e)
            + whole(b, h // self.share, i // self.size, 0, e) * f32(beta)
        )

    def _flip(self, words: Any, b: Any, h: Any, i: Any, r: Any) -> Any:
        place = r % WORD if self.bits > WORD else r
        return flip(words[b, h, i, r // WORD], place)

    def _before(self, width: int, value: Any, name: str, *, signs: bool = True) -> Any:
        """Sums over all keys before a chunk, under the signs of each bit: (b, g, chunk, r, e)."""
        rows = self.bits if signs else 1

        def one(b: Any, g: Any, j: Any, r: Any, e: Any) -> Any:
            held = value(b, g, j, e)
            return signed(held, self._flip(self.ck, b, g, j, r)) if signs else held

        n, p = te.reduce_axis((0, self.size), name="n"), te.reduce_axis((0, self.chunks), name="p")

        def term(b: Any, g: Any, c: Any, r: Any, e: Any) -> Any:
            j = c * self.size + self.old + n
            inside = tirx.all(j >= 0, j < self.S)
            return te.sum(tirx.if_then_else(inside, one(b, g, j, r, e), f32(0.0)), axis=n)

        shape = (self.B, self.G, self.chunks, rows, width)
        chunk = te.compute(shape, term, name=f"hamc_chunk_{name}")
        earlier = te.compute(
            shape,
            lambda b, g, c, r, e: te.sum(
                tirx.if_then_else(p < c, chunk[b, g, p, r, e], f32(0.0)), axis=p
            ),
            name=f"hamc_earlier_{name}",
        )
        if self.old <= 0:
            return earlier
        k = te.reduce_axis((0, self.old), name="k")
        first = te.compute(
            (self.B, self.G, rows, width),
            lambda b, g, r, e: te.sum(one(b, g, k, r, e), axis=k),
            name=f"hamc_first_{name}",
        )
        return lambda b, g, c, r, e: earlier(b, g, c, r, e) + first(b, g, r, e)
