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
LONGEST = 16  # float32 values of a vector register, on any target
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


def sums(
    parts: list[tuple[Any, Value, Value]],
    *,
    rows: int,
    width: int,
    lanes: int,
    start: Value | None = None,
    when: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Vectors of columns [rows, lanes] that hold start(i, j) + the sums of `parts`, in registers.

    A part (n, a, b) is sum_k a(i, k) b(k, j) over k < n; `when(k)` skips a k altogether. TVM keeps
    a buffer of 1,024 bytes or more on the heap, and LLVM takes a vector apart that is stored as a
    part of a longer one: so each vector column has a buffer of its own.
    """
    acc = [scratch(rows, lanes) for _ in range(0, width, lanes)]

    def each(value: Callable[[Any, Any, Any], Any]) -> None:
        with T.unroll(0, rows) as i:
            for n, column in enumerate(acc):
                with T.vectorized(0, lanes) as j:
                    T.buffer_store(column, value(column[i, j], i, n * lanes + j), [i, j])

    each(lambda _, i, j: f32(0.0) if start is None else start(i, j))
    for number, a, b in parts:
        with T.serial(0, number) as k:
            step = lambda s, i, j, a=a, b=b, k=k: s + a(i, k) * b(k, j)  # noqa: E731
            if when is None:
                each(step)
            else:
                with T.If(when(k)), T.Then():
                    each(step)
    return acc


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
    lanes = width if width % LONGEST else LONGEST
    acc = sums(parts, rows=rows, width=width, lanes=lanes, start=start, when=when)
    with T.unroll(0, rows) as i:
        for n, column in enumerate(acc):
            with T.vectorized(0, lanes) as j:
                put(i, n * lanes + j, column[i, j])


def panels(n: int, lanes: int) -> list[tuple[int, int]]:
    """(start, width) of column panels covering n rounded up to whole vectors: two vectors each."""
    padded = up(n, lanes)
    whole = [(s, 2 * lanes) for s in range(0, padded - padded % (2 * lanes), 2 * lanes)]
    return whole + ([(padded - lanes, lanes)] if padded % (2 * lanes) else [])


def fold(acc: Any, lanes: int, op: Callable[[Any, Any], Any]) -> Any:
    """Reduce the `lanes` values of acc[0, :] by halving; returns the result's expression."""
    # On a copy: an accumulator that is also read in parts would not be kept in a register. A
    # buffer for each step: LLVM would take one that is written in parts apart, value by value.
    part = scratch(1, lanes)
    with T.vectorized(0, lanes) as j:
        T.buffer_store(part, acc[0, j], [0, j])
    half = lanes // 2
    while half:
        less = scratch(1, half)
        with T.vectorized(0, half) as j:
            T.buffer_store(less, op(part[0, j], part[0, half + j]), [0, j])
        part, half = less, half // 2
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
