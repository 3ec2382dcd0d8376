"""Reshapes and transposes that see through each other, so that none stands where it need not."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from codegen.converters import argument, shape_of


def before_reshape(importer: Any, value: Any) -> Any:
    """What `value` was before it was reshaped; `value` itself if it was not."""
    bound: Any = None
    if isinstance(value, relax.Var):
        bound = importer.block_builder.lookup_binding(value)
    if getattr(getattr(bound, "op", None), "name", "") == "relax.reshape":
        return bound.args[0]
    return value


def reshaped(importer: Any, value: Any, shape: tuple[int, ...]) -> Any:
    """`value` with `shape`; nothing is emitted where it had that shape before."""
    source = before_reshape(importer, value)
    for candidate in (value, source):
        if shape_of(candidate) == shape:
            return candidate
    return importer.block_builder.emit(relax.op.reshape(source, shape))


def convert_view(node: Any, importer: Any) -> Any:
    """``aten.view`` and its relatives."""
    x, sizes = importer.env[node.args[0]], [int(n) for n in node.args[1]]
    if -1 in sizes:
        known = math.prod(n for n in sizes if n != -1)
        total = math.prod(shape_of(x))
        sizes[sizes.index(-1)] = total // known if known else 0
    return reshaped(importer, x, tuple(sizes))


def transposed(importer: Any, value: Any, order: tuple[int, ...]) -> Any:
    """`value` with its axes in `order`; transposes of transposes become one, or none."""
    builder = importer.block_builder
    bound: Any = builder.lookup_binding(value) if isinstance(value, relax.Var) else None
    if getattr(getattr(bound, "op", None), "name", "") == "relax.permute_dims":
        axes = bound.attrs.axes
        before = [int(a) for a in axes] if axes is not None else range(len(order))[::-1]
        value, order = bound.args[0], tuple(before[a] % len(order) for a in order)
    if order == tuple(range(len(order))):
        return value
    return builder.emit(relax.op.permute_dims(value, list(order)))


def convert_permute(node: Any, importer: Any) -> Any:
    """``aten.permute``."""
    x = importer.env[node.args[0]]
    return transposed(importer, x, tuple(int(a) % x.ty.ndim for a in node.args[1]))


def convert_transpose(node: Any, importer: Any) -> Any:
    """``aten.transpose``."""
    x = importer.env[node.args[0]]
    order = list(range(x.ty.ndim))
    a, b = (int(n) % x.ty.ndim for n in node.args[1:3])
    order[a], order[b] = b, a
    return transposed(importer, x, tuple(order))


def convert_cat(node: Any, importer: Any) -> Any:
    """``aten.cat``; empty parts (beside a rotation of all channels, say) are left out."""
    every = [importer.env[part] for part in node.args[0]]
    parts = [x for x in every if math.prod(shape_of(x))] or every[:1]
    if len(parts) == 1:
        return parts[0]
    return importer.block_builder.emit(relax.op.concat(parts, int(argument(node, 1, "dim", 0))))


CONVERTERS = {
    "cat.default": convert_cat,
    "permute.default": convert_permute,
    "transpose.int": convert_transpose,
    "view.default": convert_view,
    "reshape.default": convert_view,
    "_unsafe_view.default": convert_view,
}
