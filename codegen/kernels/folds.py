"""Sums over the lanes of many vectors at once, by shuffles of pairs of vectors.

Halving one vector after another takes about twice the instructions, and through memory LLVM
turns it into moves of single lanes.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.tiles import scratch


def power_of_two(n: int) -> int:
    """The least power of two from `n` on."""
    return 1 << (n - 1).bit_length()


def whole(buffer: Any, *lead: Any, lanes: int, start: Any = 0) -> Any:
    """`lanes` neighbours on the last axis of a buffer as one vector."""
    return buffer[(*lead, _at(start, lanes))]


def put(buffer: Any, value: Any, *lead: Any, lanes: int, start: Any = 0) -> None:
    """Store a vector of `lanes` neighbours on the last axis."""
    T.buffer_store(buffer, value, [*lead, _at(start, lanes)])


def all_lanes(value: float, lanes: int) -> Any:
    """A float32 constant in every lane."""
    one = tirx.const(value, "float32")
    return tirx.Broadcast(one, lanes) if lanes > 1 else one


def _at(start: Any, lanes: int) -> Any:
    start = _int(start) if isinstance(start, int) else start
    return tirx.Ramp(start, _int(1), lanes) if lanes > 1 else start


def _int(n: int) -> Any:
    return tirx.IntImm("int32", n)


def _pick(vectors: list[Any], lanes: list[int]) -> Any:
    return tirx.Shuffle(vectors, [_int(n) for n in lanes])


def sums(vectors: list[Any], lanes: int) -> Any:
    """The sum of each vector's lanes, as a vector of as many sums (one expression).

    The number of vectors and of lanes are powers of two, the first at most the second.
    """
    part = lanes  # each vector holds lanes // part of the first ones, in parts of this width
    while len(vectors) > 1:
        pairs = zip(vectors[0::2], vectors[1::2], strict=True)
        vectors = [_halved([a, b], 2 * lanes, part) for a, b in pairs]
        part //= 2
        vectors = _kept(vectors, lanes)
    while part > 1:
        vectors = [_halved(vectors, lanes, part)]
        lanes, part = lanes // 2, part // 2
        vectors = _kept(vectors, lanes)
    return vectors[0]


def _halved(vectors: list[Any], lanes: int, part: int) -> Any:
    """Lower plus upper half of each part of the vectors put together (`lanes` in all)."""
    low = [p + n for p in range(0, lanes, part) for n in range(part // 2)]
    return _pick(vectors, low) + _pick(vectors, [n + part // 2 for n in low])


def _kept(vectors: list[Any], lanes: int) -> list[Any]:
    """The vectors by way of a scratch buffer, or expressions would double at every step."""
    held = scratch(len(vectors), lanes)
    for n, value in enumerate(vectors):
        put(held, value, n, lanes=lanes)
    return [whole(held, n, lanes=lanes) for n in range(len(vectors))]


def row_sums(rows: Any, number: int, lanes: int, into: Any, *lead: Any) -> None:
    """into[*lead, i] = the sum of rows[i, :lanes], i < number; rounded up, others are undefined.

    The last axis of `into` holds `number` rounded up to a power of two.
    """
    number = power_of_two(number)
    share = min(number, lanes)
    last = int(rows.shape[0]) - 1
    for first in range(0, number, share):
        some = [whole(rows, min(first + n, last), lanes=lanes) for n in range(share)]
        put(into, sums(some, lanes), *lead, lanes=share, start=first)
