"""What was fused behind a kernel, as a function of one value (for kernels written by hand)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import ir, tirx

_PAIRS = (
    tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min,
    tirx.Max, tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or,
)  # fmt: skip
TailOf = Callable[[Any, list[Any]], Any]


class Tail:
    """What `block` stores at an index where `product` (a buffer) holds a value there.

    `block` is the last one, with those between it and the kernel inlined. It reads `product` where
    it writes, and otherwise `params` of the function, for which `args` stand in the result.

    Raises:
        ValueError: here or when called, if it is no such block.
    """

    def __init__(self, block: Any, product: Any, params: list[Any], args: list[Any]) -> None:
        self._axes = [v.var for v in block.iter_vars]
        self._stored, self._product = block.body.value, product
        self._params, self._args = params, args
        self._check(block.body.indices)

    def __call__(self, value: Any, index: list[Any]) -> Any:
        """The expression stored at `index` for the product `value`."""
        return self._moved(self._stored, value, index)

    def _moved(self, expr: Any, value: Any, index: list[Any]) -> Any:
        def moved(part: Any) -> Any:
            return self._moved(part, value, index)

        if isinstance(expr, ir.TensorLoad):
            return self._load(expr, value, index)
        if isinstance(expr, (tirx.IntImm, tirx.FloatImm)):
            return expr
        if isinstance(expr, tirx.Select):
            return tirx.Select(*map(moved, (expr.condition, expr.true_value, expr.false_value)))
        if isinstance(expr, tirx.Cast):
            return tirx.Cast(expr.ty.dtype, moved(expr.value))
        if isinstance(expr, tirx.Not):
            return tirx.Not(moved(expr.a))
        if isinstance(expr, _PAIRS):
            return type(expr)(moved(expr.a), moved(expr.b))
        if isinstance(expr, ir.Call):
            return ir.Call(expr.op, [moved(a) for a in expr.args], ret_ty=expr.ty)
        raise ValueError(f"{type(expr).__name__} in what is fused behind a kernel")

    def _load(self, expr: Any, value: Any, index: list[Any]) -> Any:
        if expr.source.same_as(self._product):
            self._check(expr.indices)
            return value
        return self._args[position(expr.source, self._params)][
            # Numbers are int64 in Relax, and int32 in kernels written by hand.
            tuple(
                int(i) if isinstance(i, tirx.IntImm) else index[position(i, self._axes)]
                for i in expr.indices
            )
        ]

    def _check(self, indices: Any) -> None:
        pairs = zip(indices, self._axes, strict=False)
        if len(indices) != len(self._axes) or not all(i.same_as(a) for i, a in pairs):
            raise ValueError("what is fused behind a kernel reads or stores at other indices")


def plain(value: Any, _index: list[Any]) -> Any:
    """The tail of a kernel that nothing is fused behind."""
    return value


def position(wanted: Any, among: list[Any]) -> int:
    """The place of a node in a list; ValueError if it is not there."""
    for n, one in enumerate(among):
        if one.same_as(wanted):
            return n
    raise ValueError(f"{wanted} is none of the parameters or axes of a kernel")
