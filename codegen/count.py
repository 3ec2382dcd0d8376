"""Counts the operations of an unscheduled PrimFunc in the vocabulary of passes/opcount.py.

Rules: every store is executed once per iteration of the loops around it, so its value's
operations are multiplied by the product of their extents. A reduction over K terms is K
additions (initial stores of a constant are free). Index arithmetic, casts, loads, bounds of
padded reads (`if_then_else`) and boolean logic are free; a function such as exp is one
operation. A condition may guard moves of data, not operations. Bytes are each parameter's size:
inputs read once, outputs (parameters that are stored to) written once.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir.prim import expr as pe
from tvm.s_tir import SBlock, SBlockRealize

from passes.opcount import OpCount

_BINARY = {pe.Add: "add", pe.Sub: "add", pe.Mul: "mul", pe.Div: "div", pe.Max: "max", pe.Min: "max"}
_BITS = {pe.LShift: "shift", pe.RShift: "shift", pe.BitwiseXor: "xor"}
_FREE_BITS = (pe.BitwiseAnd, pe.BitwiseOr)
_COMPARE = (pe.LT, pe.LE, pe.GT, pe.GE, pe.EQ, pe.NE)
_CALLS = {
    "exp": ("exp",),
    "sqrt": ("sqrt",),
    "rsqrt": ("sqrt", "div"),
    "tanh": ("tanh",),
    "erf": ("erf",),
    "log": ("log",),
    "sin": ("sin",),
    "cos": ("cos",),
    "fabs": ("abs",),
    "abs": ("abs",),
    "nearbyint": ("round",),
    "round": ("round",),
    "floor": ("round",),
    "ceil": ("round",),
    "trunc": ("round",),
    "popcount": ("popcount",),
    "shift_left": ("shift",),
    "shift_right": ("shift",),
    "bitwise_xor": ("xor",),
    "sigmoid": ("exp", "add", "div"),
}
_FREE = {
    "if_then_else", "reinterpret", "likely", "infinity", "max_value", "min_value", "bitwise_and",
    "bitwise_or", "bitwise_not", "isnan",
}  # fmt: skip


class NotCountable(ValueError):
    """A PrimFunc whose operations have no fixed number (dynamic extents, conditions)."""


def _dtype(x: Any) -> str:
    return str(getattr(x, "ty", None) or x.dtype)


class _Counter:
    def __init__(self) -> None:
        self.ops: Counter[tuple[str, str]] = Counter()
        self.stored: list[Any] = []

    # Statements. `times` is how often the statement runs.

    def stmt(self, s: Any, times: int) -> None:
        if isinstance(s, tirx.SeqStmt):
            for one in s:
                self.stmt(one, times)
        elif isinstance(s, tirx.For):
            self.stmt(s.body, times * _extent(s))
        elif isinstance(s, SBlockRealize):
            self.stmt(s.block, times)
        elif isinstance(s, SBlock):
            self.stmt(s.body, times)
        elif isinstance(s, tirx.BufferStore):
            self.store(s, times)
        elif isinstance(s, tirx.IfThenElse):
            self.guarded(s)
        elif hasattr(s, "body"):
            self.stmt(s.body, times)

    def guarded(self, s: Any) -> None:
        before = sum(self.ops.values())
        for branch in (s.then_case, s.else_case):
            if branch is not None:
                self.stmt(branch, 1)
        if sum(self.ops.values()) != before:
            raise NotCountable("operations under a condition can not be counted")

    def store(self, s: Any, times: int) -> None:
        self.stored.append(s.buffer)
        self.value(s.value, times)

    # Values.

    def value(self, x: Any, times: int) -> None:
        kind = type(x)
        if kind in _BINARY or kind in _BITS:
            self.add((_BINARY.get(kind) or _BITS[kind],), x, times)
            self.value(x.a, times)
            self.value(x.b, times)
        elif kind in _COMPARE:
            if "float" in _dtype(x.a):
                self.add(("max",), x.a, times)
                self.value(x.a, times)
                self.value(x.b, times)
        elif kind is pe.Select:
            self.add(("select",), x, times)
            for part in (x.condition, x.true_value, x.false_value):
                self.value(part, times)
        elif kind is pe.Cast:
            self.value(x.value, times)
        elif kind is pe.BitwiseNot:
            self.value(x.a, times)
        elif kind in (pe.And, pe.Or, *_FREE_BITS):
            self.value(x.a, times)
            self.value(x.b, times)
        elif hasattr(x, "op") and hasattr(x, "args"):
            self.call(x, times)

    def call(self, x: Any, times: int) -> None:
        name = str(getattr(x.op, "name", x.op)).rsplit(".", 1)[-1]
        if name in _CALLS:
            self.add(_CALLS[name], x, times)
        elif name not in _FREE:
            raise NotCountable(f"the operation {name!r} can not be counted")
        for arg in x.args:
            self.value(arg, times)

    def add(self, ops: tuple[str, ...], x: Any, times: int) -> None:
        dtype = _dtype(x).split("x")[0]
        for op in ops:
            self.ops[op, dtype] += times


def _extent(loop: Any) -> int:
    try:
        return int(loop.extent)
    except (TypeError, ValueError) as error:
        raise NotCountable(
            f"operations can not be counted: the loop {loop.loop_var.name!r} has the extent "
            f"{loop.extent}, which is not a number"
        ) from error


def count(func: Any) -> OpCount:
    """Operations and bytes of one call of an unscheduled PrimFunc with static shapes.

    NotCountable where the function can not be counted (dynamic extents, unknown calls).
    """
    walker = _Counter()
    walker.stmt(func.body, 1)
    read = written = 0
    for p in func.params:
        size = math.prod(int(n) for n in p.shape) * _bytes(str(p.dtype))
        if any(p.same_as(b) for b in walker.stored):
            written += size
        else:
            read += size
    return OpCount({key: n for key, n in walker.ops.items() if n}, read, written)


count_ops = count


def _bytes(dtype: str) -> int:
    if dtype == "bfloat16":
        return 2
    return np.dtype(dtype).itemsize
