"""Check what a user gives an artifact, before any compiled code sees it. numpy only."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.specs import TensorSpec
from codegen.weights_file import ALIGN
from passes.errors import InputError


def check_inputs(
    specs: Sequence[TensorSpec], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[NDArray[Any]]:
    """One array for each spec, in order: exact shape and dtype, C order, aligned, writable.

    `args` fill the specs in order, `kwargs` by name. Anything numpy takes as an array is fine;
    integers (and bools) are widened where nothing can be lost, other dtypes must match. Values of
    an input with a range must lie in it; NaN passes through. `InputError` names the input, what
    was given and what is expected.
    """
    given = _by_name(specs, args, kwargs)
    return [_check(spec, given[spec.name]) for spec in specs]


def _by_name(
    specs: Sequence[TensorSpec], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    names = [spec.name for spec in specs]
    if len(args) > len(names):
        raise InputError(f"{len(args)} inputs given, {_expected(names)}")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise InputError(f"unknown input {name!r}; {hint}{_expected(names)}")
        if name in given:
            raise InputError(f"input {name!r} is given twice, by position and by name")
        given[name] = value
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(f"missing input {', '.join(map(repr, missing))}; {_expected(names)}")
    return given


def _expected(names: Sequence[str]) -> str:
    return f"expected: {', '.join(names) or 'none'}"


def _check(spec: TensorSpec, value: Any) -> NDArray[Any]:
    array = _array(spec, value)
    if array.shape != spec.shape:
        raise InputError(
            f"input {spec.name!r}: shape {list(array.shape)} given, {list(spec.shape)} expected"
        )
    wanted = np.dtype(spec.dtype)
    if not _converts(array.dtype, wanted):
        raise InputError(
            f"input {spec.name!r}: dtype {array.dtype} given, {wanted} expected "
            f"(convert it with .astype({str(wanted)!r}))"
        )
    _check_range(spec, array)
    return _ready(array, wanted)


def _array(spec: TensorSpec, value: Any) -> NDArray[Any]:
    try:
        # Subclasses (masked arrays, matrices) have another idea of what an element is.
        array = np.asarray(value)
    except Exception as error:  # a foreign __array__ may raise anything
        raise InputError(
            f"input {spec.name!r}: {type(value).__name__} given, which is no array ({error})"
        ) from error
    if array.dtype.kind not in "biufc":
        raise InputError(
            f"input {spec.name!r}: {type(value).__name__} of dtype {array.dtype} given, "
            f"an array of {spec.dtype} expected"
        )
    return array


def _converts(given: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Equal but for byte order, or an integer that loses nothing."""
    if given.newbyteorder("=") == wanted:
        return True
    return given.kind in "biu" and wanted.kind in "iu" and np.can_cast(given, wanted, "safe")


def _check_range(spec: TensorSpec, array: NDArray[Any]) -> None:
    low = -np.inf if spec.low is None else spec.low
    high = np.inf if spec.high is None else spec.high
    if (spec.low is None and spec.high is None) or array.size == 0:
        return
    wrong = (array < low) | (array > high)
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        more = f" (and {int(wrong.sum()) - 1} more)" if wrong.sum() > 1 else ""
        raise InputError(
            f"input {spec.name!r}: value {array[where]} at {list(where)}{more} is out of range; "
            f"allowed are {low} to {high}"
        )


def _ready(array: NDArray[Any], wanted: np.dtype[Any]) -> NDArray[Any]:
    """`array` itself if compiled code can read it in place, else a copy that it can."""
    flags = array.flags
    in_place = flags.c_contiguous and flags.writeable and array.dtype == wanted
    if in_place and array.__array_interface__["data"][0] % ALIGN == 0:
        return array
    return aligned_copy(array, wanted)


def aligned_copy(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A copy in C order that begins at a multiple of 64 bytes."""
    size = array.size * dtype.itemsize
    room = np.empty(size + ALIGN, np.uint8)
    start = -room.__array_interface__["data"][0] % ALIGN
    copy = room[start : start + size].view(dtype).reshape(array.shape)
    copy[...] = array
    return copy
