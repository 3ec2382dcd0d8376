"""Convolutions in channels-last order, and the transposes around them taken away.

Every convolution becomes ``permute(conv_last(channels last x))``. What is channels last already
(tokens [B, T, C] that were transposed into an image, another convolution, elementwise operators
of either) is taken as it is, so between tokens and convolutions no transpose is left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from codegen.kernels import conv_last, dense
from codegen.kernels.conv import ConvShape
from codegen.legalize import as_constant, dtype_of
from codegen.target import Target

_FUSABLE = {"op_pattern": 4}
_UNARY = {
    "relax.nn.gelu", "relax.nn.gelu_tanh", "relax.nn.silu", "relax.nn.relu", "relax.exp",
    "relax.tanh", "relax.sigmoid", "relax.erf", "relax.sqrt", "relax.negative",
}  # fmt: skip
_BINARY = {"relax.add", "relax.subtract", "relax.multiply", "relax.divide"}


def channels_last(mod: Any, target: Target) -> Any:
    """`mod` with the float32 convolutions of "main" in channels-last order (CPU targets)."""
    if target.kind == "gpu":
        return mod
    rewriter = _ChannelsLast(mod, target)
    main = rewriter.visit_expr(mod["main"])
    rewriter.builder_.update_func(mod.get_global_var("main"), main)
    return relax.transform.DeadCodeElimination()(rewriter.builder_.get())


def _shape(value: Any) -> list[int]:
    return [int(d) for d in value.ty.shape]


def _name(value: Any) -> str:
    return str(getattr(getattr(value, "op", None), "name", ""))


def _to_last(rank: int) -> list[int]:
    return [0, *range(2, rank), 1]


def _to_first(rank: int) -> list[int]:
    return [0, rank - 1, *range(1, rank - 1)]


def _axes(call: Any) -> list[int]:
    rank = call.args[0].ty.ndim
    axes = call.attrs.axes
    return list(range(rank))[::-1] if axes is None else [int(a) % rank for a in axes]


@mutator
class _ChannelsLast(PyExprMutator):  # type: ignore[misc]
    def __init__(self, mod: Any, target: Target) -> None:
        super().__init__(mod)
        self.target = target
        self.made: set[Any] = set()  # results of convolutions and of what follows them

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        name = _name(call)
        made = None
        if name in ("relax.nn.conv2d", "relax.nn.conv1d"):
            made = self._convolution(call)
        elif name == "relax.permute_dims":
            made = self._cancelled(call)
        elif name in _UNARY:
            made = self._unary(call)
        elif name in _BINARY:
            made = self._binary(call)
        return call if made is None else made

    # what stands for what

    def _definition(self, value: Any) -> Any:
        value = self._origin(value)
        bound = self.lookup_binding(value) if isinstance(value, relax.Var) else None
        return value if bound is None else bound

    def _origin(self, value: Any) -> Any:
        """`value`, or the variable it is only another name of."""
        while isinstance(value, relax.Var):
            bound = self.lookup_binding(value)
            if not isinstance(bound, relax.Var):
                break
            value = bound
        return value

    def _constant(self, value: Any) -> Any | None:
        """The array behind a constant or a reshaped constant."""
        source = self._definition(value)
        if _name(source) == "relax.reshape":
            source = self._definition(source.args[0])
        array = as_constant(source)
        return None if array is None else array.reshape(_shape(value))

    def _last(self, value: Any) -> Any | None:
        """The channels-last tensor [B, ..., C] whose transpose `value` [B, C, ...] is."""
        source = self._definition(value)
        if _name(source) == "relax.permute_dims":
            kept = _axes(source) == _to_first(value.ty.ndim)
            return self._origin(source.args[0]) if kept else None
        if _name(source) != "relax.reshape":
            return None
        inner = source.args[0]
        if min(inner.ty.ndim, value.ty.ndim) < 3 or _shape(inner)[:2] != _shape(value)[:2]:
            return None
        found = self._last(inner)
        if found is None:
            return None
        batch, channels, *space = _shape(value)
        return self._reshaped(found, [batch, *space, channels])

    def _first(self, value: Any) -> Any:
        return relax.op.permute_dims(value, _to_first(value.ty.ndim))

    def _reshaped(self, x: Any, shape: list[int]) -> Any:
        if _shape(x) == shape:
            return x
        view = self.builder_.emit(relax.op.reshape(x, shape))
        if x in self.made:
            self.made.add(view)
        return view

    def _emit(self, value: Any, made: bool = True) -> Any:
        result = self.builder_.emit(value)
        if made:
            self.made.add(result)
        return result

    # operators around convolutions

    def _cancelled(self, call: Any) -> Any | None:
        if _axes(call) != _to_last(call.args[0].ty.ndim):
            return None
        return self._last(call.args[0])

    def _unary(self, call: Any) -> Any | None:
        (x,) = call.args
        source = self._origin(x)
        if source in self.made:
            return self._behind(source, lambda y: relax.Call(call.op, [y], call.attrs))
        last = self._last(x)
        if last is None or last not in self.made:
            return None
        return self._first(self._behind(last, lambda y: relax.Call(call.op, [y], call.attrs)))

    def _binary(self, call: Any) -> Any | None:
        shape = _shape(call) if call.ty is not None else None
        sides = [self._side(x, shape) for x in call.args]
        if shape is None or len(shape) < 3 or any(s is None for s in sides):
            return None
        images = [s for s in sides if isinstance(s, relax.Var)]
        if not any(s in self.made for s in images):
            return None
        if len(images) == 1:

            def apply(y: Any) -> Any:
                args = [y if s is images[0] else s for s in sides]
                return relax.Call(call.op, args, call.attrs)

            return self._first(self._behind(images[0], apply))
        return self._first(self._emit(relax.Call(call.op, sides, call.attrs)))

    def _behind(self, x: Any, apply: Any) -> Any:
        """`apply(x)`, done in front of a view so that it joins the kernel that made `x`."""
        view = self._definition(x)
        if _name(view) == "relax.reshape" and _shape(view.args[0])[-1] == _shape(x)[-1]:
            source = self._origin(view.args[0])
            if source in self.made:
                return self._reshaped(self._behind(source, apply), _shape(x))
        return self._emit(apply(x))

    def _side(self, value: Any, shape: list[int] | None) -> Any | None:
        """`value` in channels-last order, if it has the whole shape or one value a channel."""
        if shape is None:
            return None
        if _shape(value) == shape:
            return self._last(value)
        array = self._constant(value)
        if array is None:
            return None
        if array.size == 1:
            return relax.const(array.reshape(1))
        whole = (1,) * (len(shape) - array.ndim) + array.shape
        if whole != (1, shape[1], *([1] * (len(shape) - 2))):
            return None
        return relax.const(np.ascontiguousarray(array.reshape(-1)))

    # convolutions

    def _convolution(self, call: Any) -> Any | None:
        x, attrs = call.args[0], call.attrs
        weight, flat = self._constant(call.args[1]), x.ty.ndim == 3
        layouts = ("NCW", "OIW") if flat else ("NCHW", "OIHW")
        plain = (attrs.data_layout, attrs.kernel_layout) == layouts
        groups = int(attrs.groups)
        if weight is None or not plain or dtype_of(x) != "float32":
            return None
        if groups != 1 and not groups == weight.shape[0] == _shape(x)[1]:
            return None
        shape = _conv_shape(attrs, flat)
        result = self._direct(x, weight[:, :, None] if flat else weight, shape, groups)
        batch, _, wide, channels = _shape(result)
        if flat:
            result = self._reshaped(result, [batch, wide, channels])
        return self._first(result)

    def _image(self, x: Any) -> Any:
        """`x` as [B, H, W, C]; a sequence is an image one pixel high."""
        last = self._last(x)
        if last is None:
            last = self.builder_.emit(relax.op.permute_dims(x, _to_last(x.ty.ndim)))
        batch, *space, channels = _shape(last)
        return self._reshaped(last, [batch, *([1] * (2 - len(space))), *space, channels])

    def _direct(self, x: Any, weight: Any, shape: ConvShape, groups: int) -> Any:
        kernel = tuple(int(n) for n in weight.shape[2:])
        if groups > 1:
            image = self._image(x)
            taps = relax.const(np.ascontiguousarray(weight[:, 0].transpose(1, 2, 0)))
            return self._te(lambda a, w: conv_last.depthwise(a, w, shape), image, taps, "depthwise")
        if kernel == shape.stride and not any(shape.padding) and shape.dilation == (1, 1):
            return self._patches(x, weight)
        packed = relax.const(conv_last.pack_conv(weight, dense.panel_width(self.target)))
        channels = int(weight.shape[0])
        if self._last(x) is None and x.ty.ndim == 4:
            shape = replace(shape, first=True)
        else:
            x = self._image(x)
        return self._te(lambda a, w: conv_last.conv2d(a, w, channels, shape), x, packed, "conv2d")

    def _te(self, define: Any, x: Any, weight: Any, name: str) -> Any:
        result = self.builder_.emit_te(
            define, x, weight, primfunc_name_hint=name, primfunc_attrs=_FUSABLE
        )
        self.made.add(result)
        return result

    def _patches(self, x: Any, weight: Any) -> Any:
        """A convolution whose patches do not overlap is a product over patches."""
        out, _, kh, kw = weight.shape
        if self._last(x) is None and x.ty.ndim == 4:
            rows = self._patches_first(x, kh, kw)
            columns = weight.reshape(out, -1)
            size = _shape(x)[2:]
        else:
            image = self._image(x)
            rows = self._patches_last(image, kh, kw)
            columns = weight.transpose(0, 2, 3, 1).reshape(out, -1)
            size = _shape(image)[1:3]
        # [B, T, out] with the bias and what follows still to come: an image only in name.
        y = self._emit(relax.op.matmul(rows, relax.const(np.ascontiguousarray(columns.T))))
        return self._reshaped(y, [_shape(y)[0], size[0] // kh, size[1] // kw, out])

    def _patches_first(self, x: Any, kh: int, kw: int) -> Any:
        batch, inner, height, width = _shape(x)
        high, wide = height // kh, width // kw
        if height % kh or width % kw:
            x = self.builder_.emit(
                relax.op.strided_slice(x, [2, 3], [0, 0], [high * kh, wide * kw])
            )
        x = self._reshaped(x, [batch, inner, high, kh, wide, kw])
        x = self.builder_.emit(relax.op.permute_dims(x, [0, 2, 4, 1, 3, 5]))
        return self._reshaped(x, [batch, high * wide, inner * kh * kw])

    def _patches_last(self, x: Any, kh: int, kw: int) -> Any:
        batch, height, width, inner = _shape(x)
        high, wide = height // kh, width // kw
        if (kh, kw) == (1, 1):
            return self._reshaped(x, [batch, high * wide, inner])
        if height % kh or width % kw:
            x = self.builder_.emit(
                relax.op.strided_slice(x, [1, 2], [0, 0], [high * kh, wide * kw])
            )
        x = self._reshaped(x, [batch, high, kh, wide, kw, inner])
        x = self.builder_.emit(relax.op.permute_dims(x, [0, 1, 3, 2, 4, 5]))
        return self._reshaped(x, [batch, high * wide, kh * kw * inner])


def _conv_shape(attrs: Any, flat: bool) -> ConvShape:
    padding = [int(p) for p in attrs.padding]
    half = len(padding) // 2 or 1
    begin, end = padding[:half], padding[half:] or padding[:half]
    strides, dilation = [int(s) for s in attrs.strides], [int(d) for d in attrs.dilation]
    if flat:
        begin, end = [0, *begin], [0, *end]
        strides, dilation = [1, *strides], [1, *dilation]
    return ConvShape(
        (strides[0], strides[1]), (begin[0], begin[1], end[0], end[1]), (dilation[0], dilation[1])
    )
