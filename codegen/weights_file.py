"""The weights member of an artifact: a safetensors file laid out for memory-mapping.

The header is padded so that the data starts at a multiple of 64 bytes, and tensors whose size is
a multiple of 64 come first, so each of those is aligned. Any safetensors reader can read it.
Format: https://github.com/huggingface/safetensors (8-byte length, JSON header, data).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes.errors import ArtifactError

ALIGN = 64
_MAX_HEADER = 100_000_000
_NAMES = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}
_DTYPES = {code: np.dtype(name) for name, code in _NAMES.items()}


class WeightsFile:
    """Weights ready to be written: `size` bytes, given by `chunks()`."""

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """`weights`: name -> array, any shape; dtypes as numpy has them (no objects)."""
        arrays = {name: _plain(name, array) for name, array in weights.items()}
        # Sizes that keep the next tensor aligned go first.
        order = sorted(arrays, key=lambda n: arrays[n].nbytes % ALIGN != 0)
        self._arrays = [arrays[name] for name in order]
        entries, end = {}, 0
        for name in order:
            array, start = arrays[name], end
            end += array.nbytes
            entries[name] = {
                "dtype": _NAMES[array.dtype.name],
                "shape": list(array.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % ALIGN)
        self._header = len(text).to_bytes(8, "little") + text
        self.size = len(self._header) + end

    def chunks(self) -> Iterator[memoryview]:
        """The file's bytes, in order, without copying the arrays."""
        yield memoryview(self._header)
        for array in self._arrays:
            if array.size:
                yield array.reshape(-1).view(np.uint8).data


def _plain(name: str, array: NDArray[Any]) -> NDArray[Any]:
    array = np.asarray(array)
    if array.dtype.name not in _NAMES:
        raise ArtifactError(f"weight {name!r}: dtype {array.dtype} can not be stored")
    # ascontiguousarray would turn a scalar into a vector of one.
    return np.require(array, array.dtype.newbyteorder("<"), ["C"])


def without_copies(
    weights: Mapping[str, NDArray[Any]],
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """(weights to store, name -> stored name of those equal to the last bit to one stored)."""
    stored: dict[str, NDArray[Any]] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], list[str]] = {}
    for name, given in weights.items():
        array = _plain(name, given)
        data = array.reshape(-1).view(np.uint8)
        key = (array.dtype.str, array.shape, zlib.crc32(data.data))
        twins = (n for n in seen.get(key, []) if _same_bits(stored[n], data))
        twin = next(twins, None)
        if twin is None:
            stored[name] = array
            seen.setdefault(key, []).append(name)
        else:
            aliases[name] = twin
    return stored, aliases


def _same_bits(array: NDArray[Any], data: NDArray[np.uint8]) -> bool:
    return bool(np.array_equal(array.reshape(-1).view(np.uint8), data))


def read_weights(data: memoryview, where: str) -> dict[str, NDArray[Any]]:
    """Arrays over `data` (no copy). `ArtifactError` naming `where` if it is not well formed."""
    try:
        return _read(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{where}: its weights are damaged ({error})") from error


def _read(data: memoryview) -> dict[str, NDArray[Any]]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER, len(data) - 8):
        raise ValueError("header longer than the file")
    header = json.loads(bytes(data[8 : 8 + length]))
    body, found, total = data[8 + length :], {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, (start, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
        shape = tuple(int(n) for n in entry["shape"])
        count = int(np.prod(shape, dtype=object)) if shape else 1
        if min(shape, default=0) < 0 or not 0 <= start <= end <= len(body):
            raise ValueError(f"{name!r} lies outside the file")
        if end - start != count * dtype.itemsize:
            raise ValueError(f"{name!r} has the wrong size")
        found[name] = np.frombuffer(body[start:end], dtype).reshape(shape)
        total += end - start
    if total != len(body):
        raise ValueError("bytes that belong to no tensor")
    return found
