"""Arithmetic that TVM's importer does not know, or converts wrongly."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from codegen.converters import argument, shape_of
from codegen.converters.shape import before_reshape, reshaped


def _reduce(op: Any) -> Any:
    def convert(node: Any, importer: Any) -> Any:
        axes = argument(node, 1, "dim", [])
        axes = [int(axes)] if isinstance(axes, int) else [int(a) for a in axes]
        keep = bool(argument(node, 2, "keepdim", False))
        x = importer.env[node.args[0]]
        return importer.block_builder.emit(op(x, axis=axes or None, keepdims=keep))

    return convert


def convert_exp2(node: Any, importer: Any) -> Any:
    """2^x as e^(x ln 2)."""
    bb, x = importer.block_builder, importer.env[node.args[0]]
    scaled = bb.emit(relax.op.multiply(x, relax.const(math.log(2.0), str(x.ty.dtype))))
    return bb.emit(relax.op.exp(scaled))


def convert_linear(node: Any, importer: Any) -> Any:
    """``aten.linear(x, weight, bias?)``; the product's dtype is the input's."""
    bb = importer.block_builder
    x, weight = importer.env[node.args[0]], importer.env[node.args[1]]
    bias = argument(node, 2, "bias")
    y = bb.emit(relax.op.matmul(x, bb.emit(relax.op.permute_dims(weight))))
    return y if bias is None else bb.emit(relax.op.add(y, importer.env[bias]))


def convert_addmm(node: Any, importer: Any) -> Any:
    """``aten.addmm(bias, x, y)``, with beta and alpha.

    Tokens that were flattened for it are taken as they were: [B, T, K] instead of [B * T, K].
    """
    bb = importer.block_builder
    bias, x, y = (importer.env[a] for a in node.args[:3])
    source, flat = before_reshape(importer, x), shape_of(x)
    if shape_of(source)[-1:] == flat[-1:] and bias.ty.ndim == 1:
        x = source
    product = bb.emit(relax.op.matmul(x, y))
    for name in ("alpha", "beta"):
        factor = float(node.kwargs.get(name, 1))
        if factor != 1.0:
            scaled = product if name == "alpha" else bias
            scaled = bb.emit(relax.op.multiply(scaled, relax.const(factor, "float32")))
            product, bias = (scaled, bias) if name == "alpha" else (product, scaled)
    total = bb.emit(relax.op.add(product, bias))
    return reshaped(importer, total, (flat[0], shape_of(total)[-1]))


def convert_identity(node: Any, importer: Any) -> Any:
    """Ops that change nothing about the values."""
    return importer.env[node.args[0]]


def convert_pow(node: Any, importer: Any) -> Any:
    """``aten.pow.Tensor_Scalar``; small powers as products, which powf (a library call) is not."""
    bb, x, power = importer.block_builder, importer.env[node.args[0]], float(node.args[1])
    dtype = str(x.ty.dtype)
    if not dtype.startswith("float"):
        return importer._pow(node)
    if power in (2.0, 3.0, 4.0):
        square = bb.emit(relax.op.multiply(x, x))
        if power == 2.0:
            return square
        return bb.emit(relax.op.multiply(square, x if power == 3.0 else square))
    special = {0.5: relax.op.sqrt, -0.5: relax.op.rsqrt, 1.0: lambda value: value}
    if power in special:
        return bb.emit(special[power](x))
    if power == -1.0:
        return bb.emit(relax.op.divide(relax.const(1.0, dtype), x))
    return bb.emit(relax.op.power(x, relax.const(power, dtype)))


CONVERTERS = {
    "pow.Tensor_Scalar": convert_pow,
    "amax.default": _reduce(relax.op.max),
    "amin.default": _reduce(relax.op.min),
    "exp2.default": convert_exp2,
    "linear.default": convert_linear,
    "addmm.default": convert_addmm,
    "lift_fresh_copy.default": convert_identity,
    "lift_fresh.default": convert_identity,
    "contiguous.default": convert_identity,
}
