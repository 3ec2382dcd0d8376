"""Definition of the window and linear hybrid: plain loops, the meaning that is counted; not run.

Tokens are cut into blocks of C. A query meets the keys of its own and the neighbouring blocks
(causal: the one before) by softmax terms relative to their maximum, times sigmoid(mix) of its head,
and all other (earlier) blocks by features; one denominator serves both. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels.tiles import imax, load, store
from codegen.kernels.vector_math import f32

LOWEST = -1e30  # logit of a hidden key; all keys near a query are hidden where it is the maximum


@dataclass(frozen=True)
class HybridFacts:
    """What the tensors do not say.

    Inputs are q [B, H, T, D], k [B, G, T, D], v [B, G, T, E], fq [B, H, T, R], fk [B, G, T, R],
    mix [H], then the key mask [B or 1, T] where present. There are at least three blocks.
    """

    scale: float
    block: int
    causal: bool
    eps: float
    key_mask: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HybridFacts:
        """Inverse of `to_json`."""
        return cls(**data)


def define(facts: HybridFacts, params: Sequence[tuple[Sequence[int], str]]) -> Any:
    """The PrimFunc for parameters of these shapes and types; the output is [B, H, T, E]."""
    (b, h, t, _), dtype = params[0]
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        args = [T.arg(f"p{n}", T.buffer(list(s), d)) for n, (s, d) in enumerate(params)]
        out = T.arg("out", T.buffer([b, h, t, params[2][0][3]], dtype))
        T.func_attr({"tirx.noalias": True})
        _Definition(facts, args, out).write()
    return ib.get()


class Sizes:
    """Names for the tensors of either kernel and their sizes."""

    def __init__(self, facts: HybridFacts, args: Sequence[Any], out: Any) -> None:
        self.facts, self.out = facts, out
        self.q, self.k, self.v, self.fq, self.fk, self.mix = args[:6]
        self.mask: Any = args[6] if facts.key_mask else None
        self.B, self.H, self.T, self.D = (int(n) for n in self.q.shape)
        self.G, self.E, self.R = int(self.k.shape[1]), int(self.v.shape[3]), int(self.fk.shape[3])
        self.group, self.C, self.causal = self.H // self.G, facts.block, facts.causal
        self.blocks = -(-self.T // self.C)
        self.near = (2 if self.causal else 3) * self.C  # keys met by softmax

    def shown(self, b: Any, token: Any) -> Any:
        """Whether the key mask shows a token that exists."""
        return self.mask[0 if int(self.mask.shape[0]) == 1 else b, token]


class _Definition(Sizes):
    def __init__(self, facts: HybridFacts, args: Sequence[Any], out: Any) -> None:
        super().__init__(facts, args, out)
        alloc = T.sblock_alloc_buffer
        states = (self.B, self.G, self.blocks, self.R, self.E)
        self.keys = alloc((self.B, self.G, self.T, self.R), "float32")
        self.part, self.far = alloc(states, "float32"), alloc(states, "float32")
        self.part_z, self.far_z = alloc(states[:4], "float32"), alloc(states[:4], "float32")
        self.share = alloc((self.H,), "float32")

    def write(self) -> None:
        """Emit the definition."""
        with T.serial(0, self.H) as h:
            T.buffer_store(self.share, tirx.sigmoid(load(self.mix, h)), [h])
        with T.grid(self.B, self.G, self.T, self.R) as (b, g, j, r):
            value = load(self.fk, b, g, j, r)
            if self.mask is not None:
                value = value * tirx.Cast("float32", self.shown(b, j))
            T.buffer_store(self.keys, value, [b, g, j, r])
        with T.grid(self.B, self.G, self.blocks, self.R) as (b, g, n, r):
            self._sum(b, g, n, r)
        self._earlier()
        if not self.causal:
            self._later()
        with T.grid(self.B, self.H, self.T) as (b, h, i):
            self._read(b, h, i)

    def _inside(self, token: Any, value: Any) -> Any:
        return tirx.if_then_else(tirx.all(token >= 0, token < self.T), value, f32(0.0))

    def _sum(self, b: Any, g: Any, n: Any, r: Any) -> None:
        """The state of one block, row r."""
        part, at = self.part, [b, g, n, r]
        T.buffer_store(self.part_z, f32(0.0), at)
        with T.serial(0, self.E) as e:
            T.buffer_store(part, f32(0.0), [*at, e])
        with T.serial(0, self.C) as c:
            token = n * self.C + c
            key = self._inside(token, self.keys[b, g, token, r])
            T.buffer_store(self.part_z, self.part_z[tuple(at)] + key, at)
            with T.serial(0, self.E) as e:
                term = key * self._inside(token, load(self.v, b, g, token, e))
                T.buffer_store(part, part[(*at, e)] + term, [*at, e])

    def _earlier(self) -> None:
        """far of block n: the sum of the blocks up to n - 2."""
        pairs = ((self.far, self.part, [self.R, self.E]), (self.far_z, self.part_z, [self.R]))
        for far, part, rows in pairs:
            with T.grid(self.B, self.G, *rows) as (b, g, *r):
                with T.serial(0, 2) as n:
                    T.buffer_store(far, f32(0.0), [b, g, n, *r])
                with T.serial(0, self.blocks - 2) as n:
                    value = far[(b, g, n + 1, *r)] + part[(b, g, n, *r)]
                    T.buffer_store(far, value, [b, g, n + 2, *r])

    def _later(self) -> None:
        """Add the blocks from n + 2 on to far of block n."""
        last = self.blocks - 1
        pairs = ((self.far, self.part, [self.R, self.E]), (self.far_z, self.part_z, [self.R]))
        for far, part, rows in pairs:
            run = T.sblock_alloc_buffer((1,), "float32")
            with T.grid(self.B, self.G, *rows) as (b, g, *r):
                T.buffer_store(run, f32(0.0), [0])
                with T.serial(0, self.blocks - 2) as n:
                    T.buffer_store(run, run[0] + part[(b, g, last - n, *r)], [0])
                    at = [b, g, last - 2 - n, *r]
                    T.buffer_store(far, far[tuple(at)] + run[0], at)

    def _read(self, b: Any, h: Any, i: Any) -> None:
        alloc = T.sblock_alloc_buffer
        scores, query = alloc((self.near,), "float32"), alloc((self.D,), "float32")
        top, total, result = (
            alloc((1,), "float32"),
            alloc((1,), "float32"),
            alloc((self.E,), "float32"),
        )
        g, n = h // self.group, i // self.C
        first = (n - 1) * self.C
        with T.serial(0, self.D) as d:
            value = load(self.q, b, h, i, d)
            scaled = value * f32(self.facts.scale) if self.facts.scale != 1.0 else value
            T.buffer_store(query, scaled, [d])
        T.buffer_store(top, f32(LOWEST), [0])
        T.buffer_store(total, f32(0.0), [0])
        with T.serial(0, self.near) as j:
            T.buffer_store(scores, f32(0.0), [j])
            with T.serial(0, self.D) as d:
                key = self._inside(first + j, load(self.k, b, g, first + j, d))
                T.buffer_store(scores, scores[j] + query[d] * key, [j])
            hidden = tirx.Select(self._seen(b, i, first + j), scores[j], f32(LOWEST))
            T.buffer_store(scores, hidden, [j])
            T.buffer_store(top, tirx.max(top[0], scores[j]), [0])
        share = tirx.Select(top[0] > f32(LOWEST / 2), self.share[h], f32(0.0))
        with T.serial(0, self.near) as j:
            T.buffer_store(scores, tirx.exp(scores[j] - top[0]), [j])
            T.buffer_store(total, total[0] + scores[j], [0])
        T.buffer_store(top, share, [0])
        T.buffer_store(total, total[0] * top[0], [0])
        with T.serial(0, self.R) as r:
            term = load(self.fq, b, h, i, r) * self.far_z[b, g, n, r]
            T.buffer_store(total, total[0] + term, [0])
        T.buffer_store(total, tirx.max(total[0], f32(self.facts.eps)), [0])
        with T.serial(0, self.E) as e:
            T.buffer_store(result, f32(0.0), [e])
            with T.serial(0, self.near) as j:
                value = self._inside(first + j, load(self.v, b, g, first + j, e))
                T.buffer_store(result, result[e] + scores[j] * value, [e])
            T.buffer_store(result, result[e] * top[0], [e])
            with T.serial(0, self.R) as r:
                term = load(self.fq, b, h, i, r) * self.far[b, g, n, r, e]
                T.buffer_store(result, result[e] + term, [e])
            store(self.out, [b, h, i, e], result[e] / total[0])

    def _seen(self, b: Any, i: Any, token: Any) -> Any:
        tests = [token >= 0, token < self.T]
        if self.causal:
            tests.append(token <= i)
        if self.mask is not None:
            inside = tirx.min(imax(token, 0), self.T - 1)
            tests.append(self.shown(b, inside))
        return tirx.all(*tests)
