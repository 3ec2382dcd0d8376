"""Rewrites matrix products and convolutions into kernels with packed weights.

Weights that are constants are packed now, in numpy. A constant that anything else reads too (tied
embeddings) is left as it is and packed panel by panel inside the kernel, so it is stored once (and
its product stays float32, whatever the precision).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import ir, relax
from tvm.relax.expr_functor import PyExprMutator, PyExprVisitor, mutator, visitor

from codegen.kernels import activations, conv, dense, quantized
from codegen.legalize import as_constant, dtype_of
from codegen.target import Target

# FuseOps: out-elementwise-fusable, i.e. what follows elementwise may join.
_FUSABLE = {"op_pattern": 4}


def prepack(mod: Any, target: Target, precision: str = "fp32") -> Any:
    """`mod` with every float32 matmul and conv2d of "main" replaced by a packed kernel.

    Products with constant weights are computed in `precision`: "fp32", "bf16" or "int8".
    """
    uses = _ConstantUses()
    uses.visit_expr(mod["main"])
    rewriter = _Prepack(mod, target, uses, precision)
    main = rewriter.visit_expr(mod["main"])
    rewriter.builder_.update_func(mod.get_global_var("main"), main)
    return relax.transform.DeadCodeElimination()(rewriter.builder_.get())


def _shape(value: Any) -> list[int]:
    return [int(d) for d in value.ty.shape]


@visitor
class _ConstantUses(PyExprVisitor):  # type: ignore[misc]
    """Which constants and values are read by something else than one side of a product."""

    def __init__(self) -> None:
        self.definitions: dict[Any, Any] = {}
        self.read: set[Any] = set()  # values that are not only the left side of products
        self.elsewhere: set[int] = set()
        self._products: dict[int, Any] = {}

    def visit_var_binding_(self, binding: Any) -> None:
        self.definitions[binding.var] = binding.value
        self.visit_expr(binding.value)

    def visit_call_(self, op: Any) -> None:
        name = getattr(op.op, "name", "")
        if name == "relax.permute_dims" and isinstance(op.args[0], ir.GenericConst):
            return
        for at, arg in enumerate(op.args):
            kind = relax.Var if at == 0 else ir.GenericConst
            if not (name == "relax.matmul" and isinstance(arg, kind)):
                self.visit_expr(arg)

    def visit_var_(self, op: Any) -> None:
        self.read.add(op)

    def visit_dataflow_var_(self, op: Any) -> None:
        self.read.add(op)

    def visit_generic_const_(self, op: Any) -> None:
        self.elsewhere.add(_identity(op))


def _identity(constant: Any) -> int:
    """Equal for constants that share their data (a tied weight is bound twice)."""
    return int(np.from_dlpack(constant.value).ctypes.data)


@mutator
class _Prepack(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: Any, target: Target, uses: _ConstantUses, precision: str) -> None:
        super().__init__(mod)
        self.target, self.uses, self.precision = target, uses, precision
        self.converted: dict[Any, Any] = {}  # rows in the precision's own form, by their source
        self.coarse: dict[Any, Any] = {}  # activations made for such rows alone, by the exact ones

    def visit_call_(self, call: Any) -> Any:
        rows_only = bool(call.args) and call.args[0] not in self.uses.read
        call = self.visit_expr_post_order(call)
        name = getattr(call.op, "name", "")
        made = None
        if name == "relax.matmul":
            made = self._matmul(call, rows_only)
        elif name == "relax.nn.conv2d":
            made = self._conv2d(call)
        elif name == "relax.nn.conv1d":
            made = self._conv1d(call)
        return call if made is None else made

    # matrix products

    def _matmul(self, call: Any, rows_only: bool) -> Any | None:
        x, y = call.args
        if self.target.kind == "gpu":  # its rule takes the product as it is
            return None
        if not (dtype_of(x) == dtype_of(y) == "float32") or min(x.ty.ndim, y.ty.ndim) < 2:
            return None
        weight, shared = self._weight(y)
        if weight is None:
            return self._batch(x, y)
        shape = _shape(x)
        if rows_only and shared is None and self.precision != "fp32":
            x = self._coarse(x)
        flat = self._rows(x)
        if shared is not None:
            result = self._te(
                lambda a, w: dense.dense_unpacked(a, w, self.target), flat, shared, name="dense"
            )
        else:
            result = self._dense(flat, weight)
        return self._reshaped(result, [*shape[:-1], weight.shape[0]])

    def _batch(self, x: Any, y: Any) -> Any:
        return self._te(
            lambda a, b: dense.batch_matmul(a, b, self.target), x, y, name="batch_matmul"
        )

    def _dense(self, x: Any, weight: Any) -> Any:
        if self.target.kind == "gpu":
            plain = relax.const(np.ascontiguousarray(weight.T))
            return self.builder_.emit(relax.op.matmul(x, plain))
        width, (columns, depth) = dense.panel_width(self.target), weight.shape
        if self.precision == "int8" and depth <= quantized.DEEPEST:
            return self._int8(x, weight, width)
        if self.precision == "bf16":
            return self._bf16(x, weight, width)
        packed = relax.const(dense.pack(weight, width))
        return self._te(
            lambda a, w: dense.dense(a, w, columns, self.target), x, packed, name="dense"
        )

    def _coarse(self, x: Any) -> Any:
        """`x`, or if it is a GELU one within the rounding that comes next."""
        value = self._definition(x)
        if getattr(getattr(value, "op", None), "name", "") != "relax.nn.gelu":
            return x
        if x not in self.coarse:
            define = activations.elementwise(activations.gelu_coarse, "gelu_coarse")
            self.coarse[x] = self.builder_.emit_te(
                define, value.args[0], primfunc_name_hint="gelu_coarse"
            )
        return self.coarse[x]

    def _int8(self, x: Any, weight: Any, width: int) -> Any:
        codes, scale = quantized.quantize_weight(weight)
        if x not in self.converted:
            rows = self.builder_.emit_te(
                quantized.quantize_rows,
                x,
                primfunc_name_hint=quantized.QUANTIZE,
                primfunc_attrs=quantized.quantize_attributes(),
            )
            parts = [self.builder_.emit(relax.TupleGetItem(rows, n)) for n in range(3)]
            self.converted[x] = parts
        columns = int(weight.shape[0])
        return self._te(
            lambda q, s, z, w, by, total: quantized.dense_int8(
                q, s, z, w, by, total, columns, self.target
            ),
            *self.converted[x],
            relax.const(quantized.pack_groups(codes, width, "int8")),
            relax.const(scale),
            relax.const(codes.sum(axis=1, dtype=np.int32)),
            name="dense_int8",
        )

    def _bf16(self, x: Any, weight: Any, width: int) -> Any:
        bits, columns = quantized.bf16_bits(weight), int(weight.shape[0])
        widened = self.target.options.get("bf16") == "widen"
        convert = quantized.round_bf16 if widened else quantized.to_bf16
        if x not in self.converted:
            self.converted[x] = self.builder_.emit_te(
                convert, x, primfunc_name_hint=convert.__name__
            )
        if widened:
            packed, define = dense.pack(bits, width), quantized.dense_widened
        else:
            packed, define = quantized.pack_groups(bits, width, "bf16"), quantized.dense_bf16
        return self._te(
            lambda a, w: define(a, w, columns, self.target),
            self.converted[x],
            relax.const(packed),
            name="dense_bf16",
        )

    def _weight(self, y: Any) -> tuple[Any | None, Any | None]:
        """(array [N, K], the constant itself if it must stay as it is), or (None, None)."""
        value = self._definition(y)
        if isinstance(value, ir.GenericConst) and value.ty.ndim == 2:
            return np.ascontiguousarray(value.value.numpy().T), None
        if getattr(getattr(value, "op", None), "name", "") != "relax.permute_dims":
            return None, None
        source = self._definition(value.args[0])
        if not isinstance(source, ir.GenericConst) or source.ty.ndim != 2:
            return None, None
        shared = _identity(source) in self.uses.elsewhere
        return source.value.numpy(), source if shared else None

    def _definition(self, value: Any) -> Any:
        if not isinstance(value, relax.Var):
            return value
        bound = self.lookup_binding(value)
        if bound is None:
            bound = self.uses.definitions.get(value)
        return value if bound is None else bound

    def _rows(self, x: Any) -> Any:
        """x, with its batches as rows where each has a single one: [B, 1, K] is [B, K]."""
        *lead, rows, depth = _shape(x)
        count = int(np.prod(lead))
        return self._reshaped(x, [count, depth]) if rows == 1 and count > 1 else x

    def _reshaped(self, x: Any, shape: list[int]) -> Any:
        if _shape(x) == list(shape):
            return x
        return self.builder_.emit(relax.op.reshape(x, shape))

    def _te(self, define: Any, *args: Any, name: str) -> Any:
        return self.builder_.emit_te(
            define, *args, primfunc_name_hint=name, primfunc_attrs=_FUSABLE
        )

    # convolutions that codegen/graph_passes/channels_last.py left: GPUs, groups of channels

    def _conv2d(self, call: Any) -> Any | None:
        x, attrs = call.args[0], call.attrs
        weight = as_constant(self._definition(call.args[1]))
        plain = attrs.data_layout == "NCHW" and attrs.kernel_layout == "OIHW"
        if weight is None or not plain or dtype_of(x) != "float32":
            return None
        shape = conv.ConvShape(_pair(attrs.strides), _four(attrs.padding), _pair(attrs.dilation))
        return self._convolution(x, weight, shape, int(attrs.groups))

    def _conv1d(self, call: Any) -> Any | None:
        """As a 2-D convolution of images one pixel high."""
        x, attrs = call.args[0], call.attrs
        weight = as_constant(self._definition(call.args[1]))
        plain = attrs.data_layout == "NCW" and attrs.kernel_layout == "OIW"
        if weight is None or not plain or dtype_of(x) != "float32":
            return None
        left, *rest = (int(p) for p in attrs.padding)
        right = rest[0] if rest else left
        shape = conv.ConvShape(
            (1, int(attrs.strides[0])), (0, left, 0, right), (1, int(attrs.dilation[0]))
        )
        batch, channels, width = _shape(x)
        image = self._reshaped(x, [batch, channels, 1, width])
        y = self._convolution(image, weight[:, :, None], shape, int(attrs.groups))
        out, _, wide = (s for i, s in enumerate(_shape(y)) if i)
        return self._reshaped(y, [batch, out, wide])

    def _convolution(self, x: Any, weight: Any, shape: conv.ConvShape, groups: int) -> Any:
        kernel = tuple(int(n) for n in weight.shape[2:])
        patches = kernel == shape.stride and not any(shape.padding) and shape.dilation == (1, 1)
        if patches and groups == 1:
            return self._patches(x, weight)
        return self._te(
            lambda a, w: conv.grouped_conv2d(a, w, groups, shape),
            x,
            relax.const(weight),
            name="grouped_conv2d",
        )

    def _patches(self, x: Any, weight: Any) -> Any:
        """A convolution whose patches do not overlap is a product over patches."""
        out, inner, kh, kw = weight.shape
        batch, _, height, width = _shape(x)
        high, wide = height // kh, width // kw
        if height % kh or width % kw:
            x = self.builder_.emit(
                relax.op.strided_slice(x, [2, 3], [0, 0], [high * kh, wide * kw])
            )
        x = self._reshaped(x, [batch, inner, high, kh, wide, kw])
        x = self.builder_.emit(relax.op.permute_dims(x, [0, 2, 4, 1, 3, 5]))
        x = self._reshaped(x, [batch, high * wide, inner * kh * kw])
        y = self._dense(x, np.ascontiguousarray(weight.reshape(out, -1)))
        y = self.builder_.emit(relax.op.permute_dims(y, [0, 2, 1]))
        return self._reshaped(y, [batch, out, high, wide])


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(v) for v in values)
    return first, second


def _four(values: Any) -> tuple[int, int, int, int]:
    top, left, *rest = (int(v) for v in values)
    bottom, right = rest or (top, left)
    return top, left, bottom, right
