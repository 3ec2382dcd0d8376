"""The kernels a linear form may use when it is lowered (passes/linear_form.py)."""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from codegen.kernels import coded
from codegen.legalize import dtype_of
from codegen.target import Target
from passes.errors import LoweringError
from passes.linear_forms._coded_ops import FEW
from passes.linear_forms._codes import CodeSpec

_FUSABLE = {"op_pattern": 4}  # what follows elementwise may join


class LinearKit:
    """Kernels at hand, written into `builder` for `target`; all values are Relax expressions."""

    def __init__(self, builder: Any, target: Target) -> None:
        self.builder, self.target = builder, target

    def coded_linear(self, x: Any, words: Any, scale: Any, bias: Any, spec: CodeSpec) -> Any:
        """x [..., K] float32 times codes (codegen/kernels/coded.py) -> [..., N].

        words int32 [P, G, 32], scale float32 [N], bias float32 [N] or None.
        """
        if self.target.kind == "gpu":
            raise LoweringError("linear layers with coded weights have no kernel for a GPU yet")
        *lead, depth = self._shape(x)
        count = 1
        for size in lead:
            count *= size
        tokens = lead[-1] if lead else 1
        few = count <= FEW or tokens == 1
        flat = self._reshaped(x, [count, depth] if few else [count // tokens, tokens, depth])
        if not few and count == tokens:
            flat = self._reshaped(flat, [tokens, depth])
        tensors = [flat, words, scale, *([] if bias is None else [bias])]

        def define(x: Any, words: Any, scale: Any, bias: Any = None) -> Any:
            return coded.coded(x, words, scale, bias, spec, self.target)

        out = self.builder.emit(
            self.builder.call_te(
                define, *tensors, primfunc_name_hint="coded_linear", primfunc_attrs=_FUSABLE
            )
        )
        return self._reshaped(out, [*lead, self._shape(scale)[0]])

    def fixed_point(self, x: Any, steps: int, limit: int) -> Any:
        """x rounded down to whole 1 / steps and kept in -limit .. limit - 1."""
        low, high = (tirx.const(v, "float32") for v in (-float(limit), limit - 1.0))
        up, down = (tirx.const(v, "float32") for v in (float(steps), 1.0 / steps))

        def value(v: Any) -> Any:
            inside = tirx.Select(v < low, low, tirx.Select(v > high, high, v))
            return tirx.floor(inside * up) * down

        def define(x: Any) -> Any:
            return te.compute(x.shape, lambda *i: value(x(*i)), name="fixed_point")

        self._shape(x)
        return self.builder.emit(self.builder.call_te(define, x, primfunc_name_hint="fixed_point"))

    def _shape(self, x: Any) -> list[int]:
        if dtype_of(x) != "float32":
            raise LoweringError(f"linear forms take float32, got {dtype_of(x)}")
        return [int(n) for n in x.ty.shape]

    def _reshaped(self, x: Any, shape: list[int]) -> Any:
        if [int(n) for n in x.ty.shape] == shape:
            return x
        return self.builder.emit(relax.op.reshape(x, shape))
