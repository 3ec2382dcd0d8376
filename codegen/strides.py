"""Follows reshapes, transposes, slices and splits of a Relax value back to the value they read.

The result is what torch calls a strided view: a base, an offset and a stride for each axis. Such
operators copy in Relax; a kernel that reads the base through a view needs no copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import relax

from codegen.kernels.views import View, plain


@dataclass(frozen=True)
class Strided:
    """`base` holds element i of a tensor of `shape` at flat position offset + i . strides."""

    base: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _shape(expr: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in expr.ty.shape)


def _whole(expr: Any) -> Strided:
    return Strided(expr, _shape(expr), contiguous(_shape(expr)))


def follow(builder: Any, expr: Any) -> Strided:
    """`expr` (static shape) as a view of the value farthest back that still holds its data."""
    bound = builder.lookup_binding(expr) if isinstance(expr, relax.Var) else None
    step = None
    if isinstance(bound, relax.TupleGetItem):
        step = _split(builder, bound)
    elif isinstance(bound, relax.Var):
        return follow(builder, bound)
    elif isinstance(bound, relax.Call):
        step = _step(builder, bound, _shape(expr))
    return _whole(expr) if step is None else step


def _step(builder: Any, call: Any, shape: tuple[int, ...]) -> Strided | None:
    name = getattr(call.op, "name", "")
    if name == "relax.permute_dims":
        return _permute(follow(builder, call.args[0]), call.attrs.axes)
    if name in ("relax.reshape", "relax.squeeze", "relax.expand_dims"):
        return _reshape(follow(builder, call.args[0]), shape)
    if name == "relax.strided_slice":
        return _slice(follow(builder, call.args[0]), call, shape)
    return None


def _permute(x: Strided, axes: Any) -> Strided:
    order = list(reversed(range(len(x.shape)))) if axes is None else [int(a) for a in axes]
    order = [a % len(x.shape) for a in order]
    shape, strides = tuple(x.shape[a] for a in order), tuple(x.strides[a] for a in order)
    return Strided(x.base, shape, strides, x.offset)


def _reshape(x: Strided, shape: tuple[int, ...]) -> Strided | None:
    """The same elements in order with other axes; None where that needs a copy."""
    runs: list[tuple[int, int]] = []  # (size, stride) of axes that are not dense with each other
    for n, s in zip(x.shape, x.strides, strict=True):
        if n == 1:
            continue
        if runs and runs[-1][1] == s * n:
            runs[-1] = (runs[-1][0] * n, s)
        else:
            runs.append((n, s))
    strides: list[int] = []
    for n in reversed(shape):
        if n == 1 or not runs:
            strides.insert(0, 0)
            continue
        size, stride = runs[-1]
        if size % n:
            return None
        strides.insert(0, stride)
        runs[-1] = (size // n, stride * n)
        if size == n:
            runs.pop()
    return Strided(x.base, shape, tuple(strides), x.offset)


def _numbers(value: Any) -> list[int] | None:
    try:
        return [int(getattr(n, "value", n)) for n in value]
    except TypeError:
        return None


def _slice(x: Strided, call: Any, shape: tuple[int, ...]) -> Strided | None:
    """A slice with constant bounds and steps forward."""
    given = [_numbers(a) for a in call.args[1:]]
    axes, begin = given[0], given[1]
    steps = given[3] if len(given) > 3 else [1] * len(axes or ())
    if axes is None or begin is None or steps is None or min(steps, default=1) < 1:
        return None
    offset, strides = x.offset, list(x.strides)
    for axis, first, step in zip(axes, begin, steps, strict=True):
        size = x.shape[axis]
        start = min(first + size if first < 0 else first, size)
        offset += max(start, 0) * strides[axis]
        strides[axis] *= step
    return Strided(x.base, shape, tuple(strides), offset)


def _split(builder: Any, item: Any) -> Strided | None:
    call = item.tuple_value
    if isinstance(call, relax.Var):
        call = builder.lookup_binding(call)
    if getattr(getattr(call, "op", None), "name", "") != "relax.split":
        return None
    x, axis = follow(builder, call.args[0]), int(call.attrs.axis)
    axis %= len(x.shape)
    parts = [_shape_of_type(t)[axis] for t in call.ty.fields]
    start = sum(parts[: item.index])
    shape = tuple(parts[item.index] if a == axis else n for a, n in enumerate(x.shape))
    return Strided(x.base, shape, x.strides, x.offset + start * x.strides[axis])


def _shape_of_type(ty: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in ty.shape)


def view_of(builder: Any, expr: Any, argument: int = 0) -> tuple[Any, View]:
    """(value to read, view) for a 4-D `expr`; the value is `expr` itself where no view fits.

    Elements of the last axis are neighbours in the value read.
    """
    found = follow(builder, expr)
    axes = _axes(found) if len(found.shape) == 4 else None
    if axes is None or (found.shape[3] > 1 and found.strides[3] != 1):
        return expr, plain(argument, _shape(expr))
    b, h, t, x = found.shape
    return found.base, View(argument, (b, h, t, x), axes)


def _axes(x: Strided) -> Any:
    """Strides and offset spread over the axes of the base; None where an index would carry."""
    sizes = _shape(x.base)
    whole = contiguous(sizes)
    table, offset = [], x.offset
    factors = [s if n > 1 else 0 for n, s in zip(x.shape, x.strides, strict=True)]
    owners = [_owner(f, whole, sizes) for f in factors]
    for axis, (size, stride) in enumerate(zip(sizes, whole, strict=True)):
        start, offset = offset // stride, offset % stride
        row = [f // stride if o == axis else 0 for f, o in zip(factors, owners, strict=True)]
        last = start + sum(c * (n - 1) for c, n in zip(row, x.shape, strict=True))
        if last >= size:
            return None
        table.append((start, *row))
    if any(
        f and table[o][1 + i] * whole[o] != f for i, (f, o) in enumerate(_pairs(factors, owners))
    ):
        return None
    return tuple(table)


def _pairs(factors: list[int], owners: list[int]) -> Any:
    return zip(factors, owners, strict=True)


def _owner(factor: int, strides: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    """The first axis, of more than one element, whose stride divides `factor`."""
    for axis, (stride, size) in enumerate(zip(strides, sizes, strict=True)):
        if size > 1 and factor and factor % stride == 0:
            return axis
    return 0
