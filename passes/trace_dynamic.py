"""Dynamic axes: from a user's short form to torch's Dims, and back from a trace to names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim

from passes.errors import InputError

# One line of torch's "Suggested fixes": seq = Dim('seq', max=64)
_BOUND = re.compile(r"^\s*(\w+) = Dim\('(\w+)'((?:, (?:min|max)=\d+)+)\)\s*$", re.MULTILINE)
_FIXED = re.compile(r"^\s*(\w+) = (\d+)\s*$", re.MULTILINE)


def to_dims(spec: Any, inputs: Mapping[str, Any], bounds: Mapping[str, Any] | None = None) -> Any:
    """Torch's dynamic_shapes from the short form ``{"ids": {0: "batch", 1: "seq"}}``.

    Torch's own form passes through. `bounds` gives keyword arguments of Dim by name. Inputs
    that are not named are static.

    Raises:
        InputError: an input name that is not an example input, or an axis it does not have.
    """
    if not isinstance(spec, Mapping):
        return spec
    made: dict[str, Any] = {}

    def dim(value: Any) -> Any:
        name = value if isinstance(value, str) else getattr(value, "__name__", None)
        plain = isinstance(value, str) or (bounds and name in bounds)
        if not plain or name is None:
            return value
        if name not in made:
            made[name] = Dim(name, **dict((bounds or {}).get(name, {})))
        return made[name]

    for name, axes in spec.items():
        _check_axes(name, axes, inputs)
    return {
        name: {axis: dim(v) for axis, v in spec[name].items()}
        if isinstance(spec.get(name), Mapping)
        else spec.get(name)
        for name in inputs
    }


def _check_axes(name: str, axes: Any, inputs: Mapping[str, Any]) -> None:
    if name not in inputs:
        raise InputError(
            f"dynamic_shapes: {name!r} is not an example input; they are {', '.join(inputs)}"
        )
    if not isinstance(axes, Mapping) or not isinstance(inputs[name], torch.Tensor):
        return
    for axis in axes:
        if not isinstance(axis, int) or not 0 <= axis < inputs[name].dim():
            raise InputError(
                f"dynamic_shapes: input {name!r} has {inputs[name].dim()} axes, no axis {axis!r}"
            )


@dataclass(frozen=True)
class Suggestion:
    """Torch's suggested fixes: bounds by dimension name, and dimensions that must be fixed."""

    bounds: dict[str, dict[str, int]]
    fixed: dict[str, int]


def suggestion(text: str) -> Suggestion:
    """What torch suggests in the text of a constraint error."""
    bounds = {
        name: {k: int(v) for k, v in re.findall(r"(min|max)=(\d+)", rest)}
        for name, _, rest in _BOUND.findall(text)
    }
    return Suggestion(bounds, {name: int(v) for name, v in _FIXED.findall(text)})


def auto_axes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Axes that may be dynamic: axis 0 of every tensor and axis 1 of those with 2 or 3 axes."""
    return {
        name: {a: Dim.AUTO for a in range(min(value.dim(), 1 if value.dim() > 3 else 2))}
        if isinstance(value, torch.Tensor)
        else None
        for name, value in inputs.items()
    }


def batch_only(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Only axis 0 of every tensor."""
    return {
        name: {0: Dim.AUTO} if isinstance(value, torch.Tensor) and value.dim() else None
        for name, value in inputs.items()
    }


def widened(inputs: Mapping[str, Any], spec: Any) -> dict[str, Any]:
    """`inputs` with every dynamic axis of size 1 doubled: export fixes sizes 0 and 1."""
    out = dict(inputs)
    if not isinstance(spec, Mapping):
        return out
    for name, axes in spec.items():
        for axis, dim in axes.items() if isinstance(axes, Mapping) else ():
            value = out[name]
            if dim is not None and dim is not Dim.STATIC and value.shape[axis] == 1:
                out[name] = torch.cat([value, value], dim=axis)
    return out


def read_dynamic(placeholders: Mapping[str, Any], spec: Any = None) -> dict[str, dict[int, str]]:
    """Names of the dynamic axes of a traced graph: input -> axis -> name.

    `placeholders` gives each user input's traced (fake) value. The user's own names are kept;
    else axis 0 is "batch" and others "seq", numbered when there are several.
    """
    names: dict[str, str] = {}
    found: dict[str, dict[int, str]] = {}
    for wanted in (True, False):  # first the names given, then names for the rest
        for inp, value in placeholders.items():
            for axis, size in enumerate(getattr(value, "shape", ())):
                if (symbol := _symbol(size)) is None:
                    continue
                given = _given_name(spec, inp, axis)
                if symbol not in names and (given or not wanted):
                    names[symbol] = given or _fresh("seq" if axis else "batch", names)
    for inp, value in placeholders.items():
        for axis, size in enumerate(getattr(value, "shape", ())):
            if (symbol := _symbol(size)) is not None:
                found.setdefault(inp, {})[axis] = names[symbol]
    return found


def _symbol(size: Any) -> str | None:
    """The symbol of a traced size; None for a number, also one that became fixed in the trace."""
    if not isinstance(size, torch.SymInt) or size.node.expr.is_Integer:
        return None
    return str(size.node.expr)


def _given_name(spec: Any, name: str, axis: int) -> str | None:
    axes = spec.get(name) if isinstance(spec, Mapping) else None
    if isinstance(axes, tuple | list):
        axes = dict(enumerate(axes))
    dim = axes.get(axis) if isinstance(axes, Mapping) else None
    if isinstance(dim, str):
        return dim
    given = getattr(dim, "__name__", None)
    return given if isinstance(given, str) else None


def _fresh(base: str, names: Mapping[str, str]) -> str:
    taken, n, name = set(names.values()), 1, base
    while name in taken:
        n += 1
        name = f"{base}_{n}"
    return name


def size_limits(
    value: torch.Tensor, ranges: Mapping[Any, Any]
) -> tuple[tuple[int, int, int | None], ...]:
    """(axis, lowest, highest or None) sizes a traced input may have."""
    limits: list[tuple[int, int, int | None]] = []
    sizes: list[Any] = list(value.shape)
    for axis, size in enumerate(sizes):
        if _symbol(size) is None:
            limits.append((axis, int(size), int(size)))
            continue
        allowed = ranges.get(size.node.expr)
        low = 1 if allowed is None else int(allowed.lower)
        high = int(allowed.upper) if allowed is not None and allowed.upper.is_Integer else None
        # torch never assumes less than 2; the graph itself runs with 1.
        limits.append((axis, 1 if low <= 2 else low, high))
    return tuple(limits)
