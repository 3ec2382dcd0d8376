"""Factors of relative positions: e^(offset + bias) as a tensor; plain loops, counted, never run so.

The schedule is codegen/schedules/relative.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels.tiles import imax, imin, load
from codegen.kernels.vector_math import f32

HIDDEN = -5e3  # logits are relative to at least this, so that those of hidden keys vanish


@dataclass(frozen=True)
class RelativeFacts:
    """What the tensors do not say: sizes, the grid of the tokens (None: a line), causality.

    Inputs are offset [H, N], then the bias [B or 1, H or 1, T, S] where there is one. Over a line
    N is 2 w + 1, and the offsets stand for distances -w .. w to the query's own place, which is
    that of the last key for the last query.
    """

    tokens: tuple[int, int]
    grid: tuple[int, ...] | None = None
    causal: bool = False
    bias: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RelativeFacts:
        """Inverse of `to_json`."""
        known = dict(data)
        known["tokens"] = tuple(known["tokens"])
        known["grid"] = None if known["grid"] is None else tuple(known["grid"])
        return cls(**known)

    def place(self, i: Any, j: Any, number: int) -> Any:
        """Which of the `number` offsets the pair of query i and key j has."""
        if self.grid is None:
            w = number // 2
            return imin(imax(j - i - (self.tokens[1] - self.tokens[0]), -w), w) + w
        at: Any = 0
        for axis, size in enumerate(self.grid):
            inner = 1
            for after in self.grid[axis + 1 :]:
                inner *= after
            step = j // inner % size - i // inner % size + (size - 1)
            at = at * (2 * size - 1) + step
        return at

    def logit(self, offset: Any, bias: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        """offset + bias of one pair."""
        value = load(offset, h, self.place(i, j, int(offset.shape[1])))
        if bias is None:
            return value
        own = [0 if int(n) == 1 else x for n, x in zip(bias.shape, (b, h, i, j), strict=True)]
        return value + load(bias, *own)


def shape_of(facts: RelativeFacts, offset: Sequence[int], bias: Sequence[int] | None
             ) -> tuple[int, int, int, int]:  # fmt: skip
    """[B or 1, H, T, S] of the factors."""
    return (1 if bias is None else int(bias[0]), int(offset[0]), *facts.tokens)


def define(facts: RelativeFacts, params: Sequence[tuple[Sequence[int], str]]) -> Any:
    """The PrimFunc for parameters of these shapes and types."""
    shape = shape_of(facts, params[0][0], params[1][0] if facts.bias else None)
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        args = [T.arg(f"p{n}", T.buffer(list(s), d)) for n, (s, d) in enumerate(params)]
        out = T.arg("out", T.buffer(list(shape), "float32"))
        T.func_attr({"tirx.noalias": True})
        offset, bias = args[0], args[1] if facts.bias else None
        peak = T.sblock_alloc_buffer(shape[:2], "float32")
        with T.grid(*shape[:2]) as (b, h):
            T.buffer_store(peak, f32(HIDDEN), [b, h])
            with T.grid(*shape[2:]) as (i, j):
                T.buffer_store(out, facts.logit(offset, bias, b, h, i, j), [b, h, i, j])
                T.buffer_store(peak, tirx.max(peak[b, h], out[b, h, i, j]), [b, h])
            with T.grid(*shape[2:]) as (i, j):
                value = tirx.exp(out[b, h, i, j] - peak[b, h])
                if facts.causal:
                    seen = j <= i + (facts.tokens[1] - facts.tokens[0])
                    value = tirx.Select(seen, value, f32(0.0))
                T.buffer_store(out, value, [b, h, i, j])
    return ib.get()
