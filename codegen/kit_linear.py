"""The kernels a linear form may use when it is lowered (passes/linear_form.py)."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax, te, tirx

from codegen.kernels import binary, coded, dispatch, fixed, gpu_dispatch
from codegen.kernels.attention import attributes
from codegen.legalize import dtype_of
from codegen.schedules._common import threads
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
        tensors = [words, scale, *([] if bias is None else [bias])]

        def define(x: Any, words: Any, scale: Any, bias: Any = None) -> Any:
            return coded.coded(x, words, scale, bias, spec, self.target)

        return self._product(x, define, tensors, "coded_linear", self._shape(scale)[0])

    def binary_linear(
        self, x: Any, words: Any, scale: Any, alpha: Any, bias: Any, spec: CodeSpec
    ) -> Any:
        """x [..., K] float32 times binary codes (codegen/kernels/binary.py) -> [..., N].

        words int32 [P, G, 32], scale float32 [N], alpha float32 [K, bits], bias [N] or None.
        """
        tensors = [words, scale, alpha, *([] if bias is None else [bias])]

        def define(x: Any, words: Any, scale: Any, alpha: Any, bias: Any = None) -> Any:
            return binary.binary(x, words, scale, alpha, bias, spec, self.target)

        return self._product(x, define, tensors, "binary_linear", self._shape(scale)[0])

    def _product(self, x: Any, define: Any, tensors: list[Any], name: str, outputs: int) -> Any:
        """One kernel on x with its rows in one axis (a few rows) or in whole batches."""
        *lead, depth = self._shape(x)
        count, tokens = math.prod(lead), lead[-1] if lead else 1
        one = self.target.kind == "gpu" or count <= FEW or tokens in (1, count)
        flat = self._reshaped(x, [count, depth] if one else [count // tokens, tokens, depth])
        made = self.builder.call_te(
            define, flat, *tensors, primfunc_name_hint=name, primfunc_attrs=_FUSABLE
        )
        return self._reshaped(self.builder.emit(made), [*lead, outputs])

    def fixed_linear(
        self, x: Any, words: Any, base: Any, offset: Any, limit: Any, spec: CodeSpec, fraction: int
    ) -> Any:
        """x [..., K] float32 by integers alone (codegen/kernels/fixed.py) -> [..., N] float32.

        words int32 [P, G, 32], base and offset int32 [N], limit int32 [1]; int32 fixed point with
        `fraction` bits behind the point. Conversions are kernels of their own.
        """
        *lead, depth = self._shape(x)
        flat = self._reshaped(x, [math.prod(lead), depth])
        whole = self._kernel(
            lambda v, most: fixed.to_fixed(v, most, fraction), [flat, limit], "to_fixed"
        )

        def define(x: Any, words: Any, base: Any, offset: Any) -> Any:
            return fixed.fixed(x, words, base, offset, spec)

        apart = {"op_pattern": 8}  # nothing with floats may be fused in
        made = self._kernel(define, [whole, words, base, offset], "fixed_linear", apart)
        out = self._kernel(lambda y: fixed.to_float(y, fraction), [made], "to_float")
        return self._reshaped(out, [*lead, int(base.ty.shape[0])])

    def _kernel(
        self, define: Any, args: list[Any], name: str, attrs: dict[str, Any] | None = None
    ) -> Any:
        made = self.builder.call_te(
            define, *args, primfunc_name_hint=name, primfunc_attrs=attrs or {}
        )
        return self.builder.emit(made)

    def two_experts(
        self, x: Any, *, multiply: Any, words: Any, scale: Any, router: Any, bias: Any,
        codes: CodeSpec, gate: bool,
    ) -> Any:  # fmt: skip
        """x [..., K] float32, each row by one of two experts (codegen/kernels/dispatch.py).

        multiply [P, K, 32], words int32 [P, G, 32], scale [N], router [2, K], bias [N] or None;
        with `gate` a row is multiplied by its expert's probability. [..., N].
        """
        *lead, depth = self._shape(x)
        outputs = self._shape(scale)[0]
        flat = self._reshaped(x, [math.prod(lead), depth])
        given = {"x": flat, "multiply": multiply, "words": words, "scale": scale, "router": router}
        given |= {} if bias is None else {"bias": bias}
        facts = dispatch.DispatchFacts(codes, bias is not None, gate, threads(self.target))
        tensors = {n: (tuple(int(d) for d in v.ty.shape), dtype_of(v)) for n, v in given.items()}
        tensors["out"] = ((math.prod(lead), outputs), "float32")
        if self.target.kind == "gpu":
            func = gpu_dispatch.dispatch(facts, tensors)
        else:
            func = dispatch.dispatch(facts, tensors, self.target)
        func = func.without_attr("global_symbol")
        for key, value in attributes(dispatch.NAME, {"key": codes.key}).items():
            func = func.with_attr(key, value)
        name = self.builder.add_func(func, "two_experts")
        made = relax.call_tir(name, list(given.values()), relax.TensorType(*tensors["out"]))
        return self._reshaped(self.builder.emit(made), [*lead, outputs])

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
