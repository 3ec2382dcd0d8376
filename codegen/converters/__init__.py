"""Own conversions of ATen ops to Relax, one file per family, found by discovery.

A module's `CONVERTERS` maps "<op>.<overload>" to a function (node, importer) -> Relax value, where
`importer.env` maps earlier nodes to their values and `importer.block_builder` emits.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

Converter = Callable[[Any, Any], Any]


@functools.cache
def converters() -> Mapping[str, Converter]:
    """All conversions by op name."""
    found: dict[str, Converter] = {}
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{info.name}")
            found.update(getattr(module, "CONVERTERS", {}))
    return found


def argument(node: Any, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def shape_of(value: Any) -> tuple[int, ...]:
    """Static shape of a Relax value."""
    return tuple(int(d) for d in value.ty.shape)
