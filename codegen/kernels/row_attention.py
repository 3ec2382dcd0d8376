"""Definition of attentions that change whole rows of weights; counted, never run as it is.

Softmax attention (codegen/kernels/attention.py) with one of five changes:

- ``clip``: weights p become clip((zeta - gamma) p + gamma, 0, 1), gamma <= 0; no division after.
- ``mix``: each key is `parts` keys side by side, k [B, G, S, parts D]; their weights add up.
- ``top``: only the `best` largest logits of a row (of equal ones the first) keep their weight; with
  `rest` the others keep their weight in the sum, and the plain mean of their values.
- ``product``: the products q.k times the bias are the weights, without exponentials; they are not
  negative.
- ``sum``: exponentials of logits (none above 0) times values, without a maximum or a division.

Letters as in passes/site.py. The schedule is codegen/schedules/row_attention.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM, TINY, AttentionFacts, broadcast
from codegen.kernels.tiles import load, store
from codegen.kernels.vector_math import f32
from codegen.kernels.views import Layout

ROUNDS = 31  # of a bisection over the bits of floats that are not negative
FINITE = 0x7F7FFFFF  # bits of the largest finite float32


@dataclass(frozen=True)
class RowFacts:
    """The change of the rows: `kind` and what it needs."""

    kind: str
    zeta: float = 1.0
    gamma: float = 0.0
    parts: int = 1
    best: int = 1
    rest: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RowFacts:
        """Inverse of `to_json`."""
        return cls(**data)


def define(
    facts: AttentionFacts,
    change: RowFacts,
    layout: Layout,
    params: Sequence[tuple[Sequence[int], str]],
) -> Any:
    """The PrimFunc for parameters of these shapes and types; the output is as `layout` says."""
    b, h, t, e = (*layout.inputs[0].shape[:3], layout.inputs[2].shape[3])
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        args = [T.arg(f"p{n}", T.buffer(list(s), d)) for n, (s, d) in enumerate(params)]
        shape = [b, t, h * e] if layout.tokens_first else [b, h, t, e]
        out = T.arg("out", T.buffer(shape, params[0][1]))
        T.func_attr({"tirx.noalias": True})
        tensors, rest = layout.split(args)
        key_mask, bias = facts.split(rest)
        _Rows(facts, change, tensors, key_mask, bias, layout.output(out, (b, h, t, e))).write()
    return ib.get()


class _Rows:
    """Writes the definition row by row; scratch buffers hold one row."""

    def __init__(
        self,
        facts: AttentionFacts,
        change: RowFacts,
        tensors: list[Any],
        key_mask: Any,
        bias: Any,
        out: Any,
    ) -> None:
        self.facts, self.change, self.out = facts, change, out
        self.q, self.k, self.v = tensors
        self.key_mask, self.bias = key_mask, bias
        self.B, self.H, self.T, self.D = (int(n) for n in self.q.shape)
        self.S, self.E = int(self.k.shape[2]), int(self.v.shape[3])
        self.group = self.H // int(self.k.shape[1])
        self.query, self.logits = _row(self.D), _row(change.parts * self.S)
        self.peak, self.total, self.sums = _row(1), _row(1), _row(self.E)

    def write(self) -> None:
        """All rows."""
        if self.change.kind == "top" and self.change.rest:
            self._prefix()
        self.hidden = 0.0 if self.change.kind == "product" else float("-inf")
        with T.grid(self.B, self.H, self.T) as (b, h, i):
            self._scores(b, h, i)
            getattr(self, f"_{self.change.kind}")(b, h, i)

    def _prefix(self) -> None:
        """past[b, g, j] = the sum of the visible values before key j; seen[b, j] their number."""
        heads = self.H // self.group
        self.past = T.sblock_alloc_buffer((self.B, heads, self.S + 1, self.E), "float32")
        self.seen = T.sblock_alloc_buffer((self.B, self.S + 1), "float32")
        with T.serial(0, self.B) as b:
            T.buffer_store(self.seen, f32(0.0), [b, 0])
            with T.serial(0, self.S) as j:
                T.buffer_store(self.seen, self.seen[b, j] + self._one(b, j), [b, j + 1])
            with T.grid(heads, self.E) as (g, e):
                T.buffer_store(self.past, f32(0.0), [b, g, 0, e])
            with T.grid(heads, self.S, self.E) as (g, j, e):
                value = load(self.v, b, g, j, e)
                if self.key_mask is not None:
                    value = tirx.Select(broadcast(self.key_mask, (b, j)), value, f32(0.0))
                T.buffer_store(self.past, self.past[b, g, j, e] + value, [b, g, j + 1, e])

    def _one(self, b: Any, j: Any) -> Any:
        if self.key_mask is None:
            return f32(1.0)
        return tirx.Cast("float32", broadcast(self.key_mask, (b, j)))

    def _scores(self, b: Any, h: Any, i: Any) -> None:
        facts, offset = self.facts, self.S - self.T
        with T.serial(0, self.D) as d:
            x = load(self.q, b, h, i, d)
            T.buffer_store(self.query, x if facts.scale == 1.0 else x * f32(facts.scale), [d])
        T.buffer_store(self.peak, f32(MINIMUM), [0])
        with T.grid(self.change.parts, self.S) as (r, j):
            at = r * self.S + j
            T.buffer_store(self.logits, f32(0.0), [at])
            with T.serial(0, self.D) as d:
                key = load(self.k, b, h // self.group, j, r * self.D + d)
                T.buffer_store(self.logits, self.logits[at] + self.query[d] * key, [at])
            score = self.logits[at]
            masks = [] if self.key_mask is None else [broadcast(self.key_mask, (b, j))]
            if self.bias is not None:
                value = broadcast(self.bias, (b, h, i, j))
                if facts.bias == "hide":
                    masks.append(value)
                elif self.change.kind == "product":
                    score = score * value
                else:
                    score = score + tirx.Cast("float32", value)
            seen = facts.seen(i, j, offset, masks)
            if seen is not None:
                score = tirx.Select(seen, score, f32(self.hidden))
            T.buffer_store(self.logits, score, [at])
            if self.change.kind not in ("sum", "product"):
                T.buffer_store(self.peak, tirx.max(self.peak[0], self.logits[at]), [0])

    def _powers(self) -> None:
        """Exponentials of a row, parts added up, and their sum."""
        with T.serial(0, self.change.parts * self.S) as j:
            T.buffer_store(self.logits, tirx.exp(self.logits[j] - self.peak[0]), [j])
        T.buffer_store(self.total, f32(0.0), [0])
        with T.serial(0, self.S) as j:
            for r in range(1, self.change.parts):
                both = self.logits[j] + self.logits[r * self.S + j]
                T.buffer_store(self.logits, both, [j])
            T.buffer_store(self.total, self.total[0] + self.logits[j], [0])
        if self.facts.hides or self.facts.bias:
            T.buffer_store(self.total, tirx.max(self.total[0], f32(TINY)), [0])

    def _sum(self, b: Any, h: Any, i: Any) -> None:
        with T.serial(0, self.S) as j:
            T.buffer_store(self.logits, tirx.exp(self.logits[j]), [j])
        self._values(b, h)
        with T.serial(0, self.E) as e:
            store(self.out, [b, h, i, e], self.sums[e])

    def _product(self, b: Any, h: Any, i: Any) -> None:
        T.buffer_store(self.total, f32(0.0), [0])
        with T.serial(0, self.S) as j:
            T.buffer_store(self.total, self.total[0] + self.logits[j], [0])
        T.buffer_store(self.total, tirx.max(self.total[0], f32(TINY)), [0])
        self._values(b, h)
        with T.serial(0, self.E) as e:
            store(self.out, [b, h, i, e], self.sums[e] / self.total[0])

    def _values(self, b: Any, h: Any) -> None:
        with T.serial(0, self.E) as e:
            T.buffer_store(self.sums, f32(0.0), [e])
            with T.serial(0, self.S) as j:
                value = self.logits[j] * load(self.v, b, h // self.group, j, e)
                T.buffer_store(self.sums, self.sums[e] + value, [e])

    def _mix(self, b: Any, h: Any, i: Any) -> None:
        self._powers()
        self._values(b, h)
        with T.serial(0, self.E) as e:
            store(self.out, [b, h, i, e], self.sums[e] / self.total[0])

    def _clip(self, b: Any, h: Any, i: Any) -> None:
        change = self.change
        self._powers()
        T.buffer_store(self.total, f32(change.zeta - change.gamma) / self.total[0], [0])
        with T.serial(0, self.S) as j:
            moved = self.logits[j] * self.total[0] + f32(change.gamma)
            T.buffer_store(self.logits, tirx.min(tirx.max(moved, f32(0.0)), f32(1.0)), [j])
        self._values(b, h)
        with T.serial(0, self.E) as e:
            store(self.out, [b, h, i, e], self.sums[e])

    def _top(self, b: Any, h: Any, i: Any) -> None:
        change, some = self.change, min(self.change.best, self.S)
        limit = self._threshold(some)
        chosen = T.sblock_alloc_buffer((self.S + 1,), "int32")
        number = T.sblock_alloc_buffer((1,), "int32")
        weights, rest = _row(self.S), _row(1)
        T.buffer_store(number, _i32(0), [0])
        T.buffer_store(rest, f32(0.0), [0])
        for equal in (False, True):  # the nearer ones, then as many as there is room for
            with T.serial(0, self.S) as j:
                at, room = _bits(self.logits[j]), number[0] < some
                near = tirx.all(at == limit, room) if equal else at < limit
                if equal and change.rest:
                    left = tirx.Select(tirx.any(at < limit, near), f32(0.0), weights[j])
                    T.buffer_store(rest, rest[0] + left, [0])
                elif not equal:
                    T.buffer_store(weights, tirx.exp(f32(0.0) - self.logits[j]), [j])
                T.buffer_store(chosen, j, [number[0]])
                T.buffer_store(number, tirx.Select(near, number[0] + 1, number[0]), [0])
        T.buffer_store(self.total, rest[0], [0])
        with T.serial(0, self.E) as e:
            T.buffer_store(self.sums, f32(0.0), [e])
        with T.serial(0, some) as n:
            self._take(b, h, n, chosen, weights, number)
        if change.rest:
            self._remainder(b, h, i, rest, chosen, number, some)
        if self.facts.hides or self.facts.bias:
            T.buffer_store(self.total, tirx.max(self.total[0], f32(TINY)), [0])
        with T.serial(0, self.E) as e:
            store(self.out, [b, h, i, e], self.sums[e] / self.total[0])

    def _take(self, b: Any, h: Any, n: Any, chosen: Any, weights: Any, number: Any) -> None:
        """Add the value of the n-th chosen key."""
        j = tirx.min(chosen[n], self.S - 1)
        weight = tirx.if_then_else(n < number[0], weights[j], f32(0.0))
        T.buffer_store(self.total, self.total[0] + weight, [0])
        with T.serial(0, self.E) as e:
            value = weight * load(self.v, b, h // self.group, j, e)
            T.buffer_store(self.sums, self.sums[e] + value, [e])

    def _remainder(
        self, b: Any, h: Any, i: Any, rest: Any, chosen: Any, number: Any, some: int
    ) -> None:
        """Add what is left of the weights times the mean of the values that are left."""
        end: Any = self.S
        if self.facts.causal:
            end = tirx.max(tirx.min(i + (self.S - self.T) + 1, self.S), 0)
        g, left, factor = h // self.group, _row(self.E), _row(1)
        others = self.seen[b, end] - tirx.Cast("float32", number[0])
        T.buffer_store(factor, rest[0] / tirx.max(others, f32(1.0)), [0])
        with T.serial(0, self.E) as e:
            T.buffer_store(left, self.past[b, g, end, e], [e])
            with T.serial(0, some) as n:
                j = tirx.min(chosen[n], self.S - 1)
                value = tirx.if_then_else(n < number[0], load(self.v, b, g, j, e), f32(0.0))
                T.buffer_store(left, left[e] - value, [e])
            T.buffer_store(self.sums, self.sums[e] + left[e] * factor[0], [e])

    def _threshold(self, some: int) -> Any:
        """The row becomes its distances below the maximum; the bits of the some-th smallest.

        Distances are not negative, so their bits have their order.
        """
        low, high, half, count = (T.sblock_alloc_buffer((1,), "int32") for _ in range(4))
        with T.serial(0, self.S) as j:
            T.buffer_store(self.logits, self.peak[0] - self.logits[j], [j])
        T.buffer_store(low, _i32(0), [0])
        T.buffer_store(high, _i32(FINITE), [0])
        with T.serial(0, ROUNDS):
            T.buffer_store(half, low[0] + ((high[0] - low[0]) >> _i32(1)), [0])
            T.buffer_store(count, _i32(0), [0])
            with T.serial(0, self.S) as j:
                one = tirx.Select(_bits(self.logits[j]) <= half[0], _i32(1), _i32(0))
                T.buffer_store(count, count[0] + one, [0])
            enough = count[0] >= some
            T.buffer_store(low, tirx.Select(enough, low[0], half[0] + 1), [0])
            T.buffer_store(high, tirx.Select(enough, half[0], high[0]), [0])
        return high[0]


def _row(n: int) -> Any:
    return T.sblock_alloc_buffer((n,), "float32")


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")


def _bits(x: Any) -> Any:
    return tirx.reinterpret("int32", x)
