"""Loop nests shared by the hand-scheduled attention kernels, written with TVM's IR builder.

Everything here emits statements into the current IR builder frame. Register tiles are `ROWS` x
two vectors of float32: 16 accumulators, which hides the latency of a fused multiply-add and
leaves registers for operands on AVX-512 and NEON alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels.vector_math import f32
from codegen.kernels.views import Viewed

ROWS = 8
Value = Callable[[Any, Any], Any]


def up(n: int, m: int) -> int:
    """`n` rounded up to a multiple of `m`."""
    return -(-n // m) * m


def imin(a: Any, b: Any) -> Any:
    """Smaller of two index expressions."""
    return tirx.min(a, b)


def imax(a: Any, b: Any) -> Any:
    """Larger of two index expressions."""
    return tirx.max(a, b)


def load(buffer: Any, *index: Any) -> Any:
    """An element as float32."""
    value = buffer[index]
    return value if str(buffer.dtype) == "float32" else tirx.Cast("float32", value)


def store(buffer: Any, index: list[Any], value: Any) -> None:
    """Store a float32 value in the buffer's own type."""
    dtype = str(buffer.dtype)
    if isinstance(buffer, Viewed):
        buffer, index = buffer.source, buffer.view.index(*index)
    T.buffer_store(buffer, value if dtype == "float32" else tirx.Cast(dtype, value), index)


def scratch(*shape: int) -> Any:
    """A float32 buffer private to the innermost loop that holds all its uses."""
    return T.sblock_alloc_buffer(shape, "float32")


def vectors(n: int, lanes: int, body: Callable[[Any], None]) -> None:
    """body(j) for j in 0..n-1: whole vectors, then single elements."""
    if n >= lanes:
        with T.serial(0, n // lanes) as o, T.vectorized(0, lanes) as j:
            body(o * lanes + j)
    if n % lanes:
        with T.serial(0, n % lanes) as j:
            body(n // lanes * lanes + j)


def fill(buffer: Any, rows: int, width: int, value: float = 0.0) -> None:
    """Set a scratch buffer of `rows` vectors of `width` values."""
    with T.serial(0, rows) as i, T.vectorized(0, width) as j:
        T.buffer_store(buffer, f32(value), [i, j])


def tile(
    a: Value,
    b: Value,
    extents: list[tuple[Any, Value, Value]] | Any,
    put: Callable[[Any, Any, Any], None],
    *,
    rows: int = ROWS,
    width: int,
    start: Value | None = None,
    when: Callable[[Any], Any] | None = None,
) -> None:
    """put(i, j, start(i, j) + sum_k a(i, k) b(k, j)) for a tile rows x width held in registers.

    `extents` is the number of k, or a list of (number of k, a, b) summed one after the other.
    `when(k)` skips a k altogether.
    """
    parts = extents if isinstance(extents, list) else [(extents, a, b)]
    acc = scratch(rows, width)
    with T.unroll(0, rows) as i, T.vectorized(0, width) as j:
        T.buffer_store(acc, f32(0.0) if start is None else start(i, j), [i, j])
    for number, left, right in parts:
        with T.serial(0, number) as k:
            if when is None:
                _step(acc, left, right, k, rows, width)
            else:
                with T.If(when(k)), T.Then():
                    _step(acc, left, right, k, rows, width)
    with T.unroll(0, rows) as i, T.vectorized(0, width) as j:
        put(i, j, acc[i, j])


def _step(acc: Any, a: Value, b: Value, k: Any, rows: int, width: int) -> None:
    with T.unroll(0, rows) as i, T.vectorized(0, width) as j:
        T.buffer_store(acc, acc[i, j] + a(i, k) * b(k, j), [i, j])


def panels(n: int, lanes: int) -> list[tuple[int, int]]:
    """(start, width) of column panels covering n rounded up to whole vectors: two vectors each."""
    padded = up(n, lanes)
    whole = [(s, 2 * lanes) for s in range(0, padded - padded % (2 * lanes), 2 * lanes)]
    return whole + ([(padded - lanes, lanes)] if padded % (2 * lanes) else [])


def fold(acc: Any, lanes: int, op: Callable[[Any, Any], Any]) -> Any:
    """Reduce the `lanes` values of acc[0, :] by halving; returns the result's expression."""
    # On a copy: an accumulator that is also read in parts would not be kept in a register.
    part = scratch(1, lanes)
    with T.vectorized(0, lanes) as j:
        T.buffer_store(part, acc[0, j], [0, j])
    half = lanes // 2
    while half:
        with T.vectorized(0, half) as j:
            T.buffer_store(part, op(part[0, j], part[0, half + j]), [0, j])
        half //= 2
    return part[0, 0]


def reduce_row(
    n: Any, lanes: int, value: Callable[[Any], Any], op: Callable[[Any, Any], Any], first: float
) -> Any:
    """op over value(j), j < n (or n * lanes if n is an expression); the result's expression."""
    tail = n % lanes if isinstance(n, int) else 0
    blocks = n // lanes if isinstance(n, int) else n
    acc = scratch(1, lanes)
    fill(acc, 1, lanes, first)
    with T.serial(0, blocks) as o, T.vectorized(0, lanes) as j:
        T.buffer_store(acc, op(acc[0, j], value(o * lanes + j)), [0, j])
    result = fold(acc, lanes, op)
    if not tail:
        return result
    one = scratch(1, 1)
    T.buffer_store(one, result, [0, 0])
    with T.serial(0, tail) as j:
        T.buffer_store(one, op(one[0, 0], value(blocks * lanes + j)), [0, 0])
    return one[0, 0]


def build(func: Any, body: Callable[..., None]) -> Any:
    """A PrimFunc with the parameters of `func` and the statements body(*buffers) emits."""
    buffers = list(func.params)
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        args = [
            T.arg(f"p{n}", T.buffer([int(d) for d in b.shape], str(b.dtype)))
            for n, b in enumerate(buffers)
        ]
        T.func_attr({"tirx.noalias": True})
        with T.sblock("root"):
            body(*args)
    return ib.get()
