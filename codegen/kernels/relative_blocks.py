"""Features times relative factors that are one number on each side far away: plain loops, counted.

Tokens are cut into blocks of C. A query meets the keys of its own and the neighbouring blocks
(causal: the one before) one by one, each with the factor of its distance, and all other blocks by
the sums of their features and values, with the largest factor of distances beyond a block on their
side (all are alike, but for 0 where a bias hides all pairs). Sums are float32. Two more definitions
make the table of factors and the visible keys out of a bias. The schedules are
codegen/schedules/relative_blocks.py and relative_table.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM
from codegen.kernels.relative import HIDDEN
from codegen.kernels.tiles import imax, imin, load, store
from codegen.kernels.vector_math import f32

TINY = 1e-30


@dataclass(frozen=True)
class BlockFacts:
    """What the tensors do not say.

    Inputs are fq [B, H, T, R], fk [B, G, T, R], v [B, G, T, E], table [B or 1, H, 2 T - 1] of
    factors by distance, then the visible keys [B or 1, T] where not all are. Factors more than
    `block` away are alike on each side. There are at least three blocks.
    """

    block: int
    causal: bool
    key_mask: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BlockFacts:
        """Inverse of `to_json`."""
        return cls(**data)


class Sizes:
    """Names for the tensors of either kernel and their sizes."""

    def __init__(self, facts: BlockFacts, args: Sequence[Any], out: Any) -> None:
        self.facts, self.out, self.causal, self.C = facts, out, facts.causal, facts.block
        self.fq, self.fk, self.v, self.table = args[:4]
        self.mask: Any = args[4] if facts.key_mask else None
        self.B, self.H, self.T, self.R = (int(n) for n in self.fq.shape)
        self.G, self.E = int(self.fk.shape[1]), int(self.v.shape[3])
        self.group, self.blocks = self.H // self.G, -(-self.T // self.C)
        self.near = (2 if self.causal else 3) * self.C  # keys met one by one

    def factor(self, b: Any, h: Any, distance: Any) -> Any:
        """The factor of a distance of key from query."""
        return self.table[0 if int(self.table.shape[0]) == 1 else b, h, distance + (self.T - 1)]

    def distance(self, side: int, n: Any) -> Any:
        """The n-th distance of more than a block before (side 0) or after (1) a query."""
        return n + (self.C + 1) if side else n - (self.T - 1)

    def shown(self, b: Any, token: Any) -> Any:
        """Whether a token is visible."""
        return self.mask[0 if int(self.mask.shape[0]) == 1 else b, token]


def define(facts: BlockFacts, params: Sequence[tuple[Sequence[int], str]]) -> Any:
    """The PrimFunc for parameters of these shapes and types; the output is [B, H, T, E]."""
    b, h, t, _ = params[0][0]
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        args = [T.arg(f"p{n}", T.buffer(list(s), d)) for n, (s, d) in enumerate(params)]
        out = T.arg("out", T.buffer([b, h, t, params[2][0][3]], params[0][1]))
        T.func_attr({"tirx.noalias": True})
        _Definition(facts, args, out).write()
    return ib.get()


class _Definition(Sizes):
    def __init__(self, facts: BlockFacts, args: Sequence[Any], out: Any) -> None:
        super().__init__(facts, args, out)
        # The last column of values is a one, which carries the denominator along.
        width = self.E + 1
        self.values = T.sblock_alloc_buffer((self.B, self.G, self.T, width), "float32")
        self.part = T.sblock_alloc_buffer((self.B, self.G, self.blocks, self.R, width), "float32")
        self.far = T.sblock_alloc_buffer((self.B, self.H, self.blocks, self.R, width), "float32")
        self.ends = T.sblock_alloc_buffer((self.B, self.H, 2), "float32")

    def write(self) -> None:
        """Emit the definition."""
        with T.grid(self.B, self.G, self.T, self.E + 1) as (b, g, j, e):
            value = tirx.if_then_else(
                e < self.E, load(self.v, b, g, j, imin(e, self.E - 1)), f32(1.0)
            )
            if self.mask is not None:
                value = tirx.Select(self.shown(b, j), value, f32(0.0))
            T.buffer_store(self.values, value, [b, g, j, e])
        with T.grid(self.B, self.G, self.blocks, self.R, self.E + 1) as (b, g, n, r, e):
            at = [b, g, n, r, e]
            T.buffer_store(self.part, f32(0.0), at)
            with T.serial(0, self.C) as c:
                token = imin(n * self.C + c, self.T - 1)
                inside = tirx.if_then_else(
                    n * self.C + c < self.T, self.values[b, g, token, e], f32(0.0)
                )
                term = load(self.fk, b, g, token, r) * inside
                T.buffer_store(self.part, self.part[tuple(at)] + term, at)
        with T.grid(self.B, self.H) as (b, h):
            for side in (0,) if self.causal else (0, 1):
                T.buffer_store(self.ends, f32(0.0), [b, h, side])
                with T.serial(0, self.T - 1 - self.C) as n:
                    value = self.factor(b, h, self.distance(side, n))
                    T.buffer_store(self.ends, tirx.max(self.ends[b, h, side], value), [b, h, side])
        with T.grid(self.B, self.H, self.R, self.E + 1) as (b, h, r, e):
            self._add_up(b, h, r, e)
        with T.grid(self.B, self.H, self.T) as (b, h, i):
            self._read(b, h, i)

    def _add_up(self, b: Any, h: Any, r: Any, e: Any) -> None:
        """far of block n: the blocks to n - 2 and from n + 2 on, by the factors of their sides."""
        run, g, last = T.sblock_alloc_buffer((1,), "float32"), h // self.group, self.blocks - 1
        T.buffer_store(run, f32(0.0), [0])
        for n in (0, 1):
            T.buffer_store(self.far, f32(0.0), [b, h, n, r, e])
        with T.serial(0, self.blocks - 2) as n:
            T.buffer_store(run, run[0] + self.part[b, g, n, r, e], [0])
            value = run[0] * self.ends[b, h, 0]
            T.buffer_store(self.far, value, [b, h, n + 2, r, e])
        if self.causal:
            return
        T.buffer_store(run, f32(0.0), [0])
        with T.serial(0, self.blocks - 2) as n:
            T.buffer_store(run, run[0] + self.part[b, g, last - n, r, e], [0])
            at = [b, h, last - 2 - n, r, e]
            value = self.far[tuple(at)] + run[0] * self.ends[b, h, 1]
            T.buffer_store(self.far, value, at)

    def _read(self, b: Any, h: Any, i: Any) -> None:
        weights = T.sblock_alloc_buffer((self.near,), "float32")
        result = T.sblock_alloc_buffer((self.E + 1,), "float32")
        g, n = h // self.group, i // self.C
        first = (n - 1) * self.C
        with T.serial(0, self.near) as j:
            token = imin(imax(first + j, 0), self.T - 1)
            T.buffer_store(weights, f32(0.0), [j])
            with T.serial(0, self.R) as r:
                term = load(self.fq, b, h, i, r) * load(self.fk, b, g, token, r)
                T.buffer_store(weights, weights[j] + term, [j])
            inside = tirx.all(first + j >= 0, first + j < self.T)
            value = tirx.if_then_else(inside, self.factor(b, h, token - i), f32(0.0))
            T.buffer_store(weights, weights[j] * value, [j])
        with T.serial(0, self.E + 1) as e:
            T.buffer_store(result, f32(0.0), [e])
            with T.serial(0, self.near) as j:
                token = imin(imax(first + j, 0), self.T - 1)
                T.buffer_store(result, result[e] + weights[j] * self.values[b, g, token, e], [e])
            with T.serial(0, self.R) as r:
                term = load(self.fq, b, h, i, r) * self.far[b, h, n, r, e]
                T.buffer_store(result, result[e] + term, [e])
        T.buffer_store(result, tirx.max(result[self.E], f32(TINY)), [self.E])
        with T.serial(0, self.E) as e:
            store(self.out, [b, h, i, e], result[e] / result[self.E])


def table(tokens: int, causal: bool, params: Sequence[tuple[Sequence[int], str]]) -> Any:
    """Factors by distance [B or 1, H, 2 T - 1] of offset [H, 2 w + 1] and a bias [.., T, T].

    The bias has the largest value of each diagonal; all are relative to the largest.
    """
    heads, number = (int(n) for n in params[0][0])
    batch, wide = int(params[1][0][0]) if len(params) > 1 else 1, 2 * tokens - 1
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        args = [T.arg(f"p{n}", T.buffer(list(s), d)) for n, (s, d) in enumerate(params)]
        out = T.arg("out", T.buffer([batch, heads, wide], "float32"))
        T.func_attr({"tirx.noalias": True})
        peak, reach = T.sblock_alloc_buffer((1,), "float32"), number // 2
        with T.grid(batch, heads) as (b, h):
            if len(params) > 1:
                _diagonals(out, args[1], b, h, tokens)
            T.buffer_store(peak, f32(HIDDEN), [0])
            with T.serial(0, wide) as t:
                value = load(args[0], h, imin(imax(t - (tokens - 1), -reach), reach) + reach)
                value = value + out[b, h, t] if len(params) > 1 else value
                T.buffer_store(out, value, [b, h, t])
                T.buffer_store(peak, tirx.max(peak[0], out[b, h, t]), [0])
            with T.serial(0, wide) as t:
                value = tirx.exp(out[b, h, t] - peak[0])
                if causal:
                    value = tirx.Select(t < tokens, value, f32(0.0))
                T.buffer_store(out, value, [b, h, t])
    return ib.get()


def _diagonals(out: Any, bias: Any, b: Any, h: Any, tokens: int) -> None:
    with T.serial(0, 2 * tokens - 1) as t:
        T.buffer_store(out, f32(MINIMUM), [b, h, t])
    head = 0 if int(bias.shape[1]) == 1 else h
    with T.grid(tokens, tokens) as (i, j):
        at = [b, h, j - i + (tokens - 1)]
        T.buffer_store(out, tirx.max(out[tuple(at)], load(bias, b, head, i, j)), at)


def visible(params: Sequence[tuple[Sequence[int], str]]) -> Any:
    """Keys that a bias [B, H, T, T] hides from no query: bool [B, T]."""
    batch, _, tokens, _ = (int(n) for n in params[0][0])
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        bias = T.arg("p0", T.buffer(list(params[0][0]), params[0][1]))
        out = T.arg("out", T.buffer([batch, tokens], "bool"))
        T.func_attr({"tirx.noalias": True})
        high = T.sblock_alloc_buffer((tokens,), "float32")
        with T.serial(0, batch) as b:
            with T.serial(0, tokens) as j:
                T.buffer_store(high, f32(MINIMUM), [j])
            with T.grid(tokens, tokens) as (i, j):
                T.buffer_store(high, tirx.max(high[j], load(bias, b, 0, i, j)), [j])
            with T.serial(0, tokens) as j:
                T.buffer_store(out, high[j] > f32(HIDDEN), [b, j])
    return ib.get()
