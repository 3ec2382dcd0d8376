"""Reshapes that see through each other, so that none stands between a product and what follows."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from codegen.converters import shape_of


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


CONVERTERS = {
    "view.default": convert_view,
    "reshape.default": convert_view,
    "_unsafe_view.default": convert_view,
}
