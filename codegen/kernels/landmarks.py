"""Definitions of landmarks and small inverses; counted, never run as they are.

Landmarks are means of the visible tokens cut into runs of almost equal length: the r-th of n
visible tokens belongs to run r min(m, n) // n. Letters as in passes/site.py; m landmarks. The
schedule is codegen/schedules/landmarks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM
from codegen.kernels.tiles import load
from codegen.kernels.vector_math import f32

TINY = 1e-30
Parameter = tuple[Sequence[int], str]  # shape and dtype


def prim(params: Sequence[Parameter], out: Parameter, body: Callable[..., None]) -> Any:
    """A PrimFunc of these parameters and this output with the statements body(*buffers) emits."""
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        args = [T.arg(f"p{n}", T.buffer(list(s), d)) for n, (s, d) in enumerate(params)]
        args.append(T.arg("out", T.buffer(list(out[0]), out[1])))
        T.func_attr({"tirx.noalias": True})
        body(*args)
    return ib.get()


def one_of(mask: Any, b: Any, j: Any) -> Any:
    """Whether token j is visible: an element of a key mask [B or 1, S]."""
    return mask[0 if int(mask.shape[0]) == 1 else b, j]


def segments(block: int, x: Any, *rest: Any) -> None:
    """Means of runs: x [B, G, S, D], perhaps a key mask [B or 1, S] -> [B, G, m, D].

    With `block` a run is so many neighbouring tokens, visible or not.
    """
    mask, out = (rest[0] if len(rest) == 2 else None), rest[-1]
    b_, g_, s_, d_ = (int(n) for n in x.shape)
    m_ = int(out.shape[2])
    sums = T.sblock_alloc_buffer((g_, m_, d_), "float32")
    sizes = T.sblock_alloc_buffer((m_,), "float32")
    number, rank = (T.sblock_alloc_buffer((1,), "int32") for _ in range(2))
    with T.serial(0, b_) as b:
        T.buffer_store(number, tirx.const(s_ if mask is None else 0, "int32"), [0])
        T.buffer_store(rank, tirx.const(0, "int32"), [0])
        if mask is not None:
            with T.serial(0, s_) as j:
                one = tirx.Cast("int32", one_of(mask, b, j))
                T.buffer_store(number, number[0] + one, [0])
        with T.serial(0, m_) as r:
            T.buffer_store(sizes, f32(0.0), [r])
        with T.grid(g_, m_, d_) as (g, r, d):
            T.buffer_store(sums, f32(0.0), [g, r, d])
        with T.serial(0, s_) as j:
            run = j // block if block else run_of(rank[0], number[0], m_)
            one = f32(1.0) if mask is None else tirx.Cast("float32", one_of(mask, b, j))
            T.buffer_store(sizes, sizes[run] + one, [run])
            with T.grid(g_, d_) as (g, d):
                value = load(x, b, g, j, d)
                if mask is not None:
                    value = tirx.Select(one_of(mask, b, j), value, f32(0.0))
                T.buffer_store(sums, sums[g, run, d] + value, [g, run, d])
            step = tirx.const(1, "int32")
            if mask is not None:
                step = tirx.Cast("int32", one_of(mask, b, j))
            T.buffer_store(rank, rank[0] + step, [0])
        with T.serial(0, m_) as r:
            T.buffer_store(sizes, f32(1.0) / tirx.max(sizes[r], f32(1.0)), [r])
        with T.grid(g_, m_, d_) as (g, r, d):
            T.buffer_store(out, sums[g, r, d] * sizes[r], [b, g, r, d])


def run_of(rank: Any, number: Any, m: int) -> Any:
    """The run of the rank-th of `number` visible tokens (an index within 0 .. m - 1)."""
    return tirx.min(rank * tirx.min(number, m) // tirx.max(number, 1), m - 1)


def filled(mask: Any, out: Any) -> None:
    """Which landmarks have tokens: a key mask [B or 1, S] -> bool [B or 1, m]."""
    rows, keys = (int(n) for n in mask.shape)
    number = T.sblock_alloc_buffer((1,), "int32")
    with T.serial(0, rows) as b:
        T.buffer_store(number, tirx.const(0, "int32"), [0])
        with T.serial(0, keys) as j:
            T.buffer_store(number, number[0] + tirx.Cast("int32", mask[b, j]), [0])
        with T.serial(0, int(out.shape[1])) as r:
            T.buffer_store(out, r < number[0], [b, r])


class _Square:
    """m x m matrices of one head, in plain loops."""

    def __init__(self, m: int) -> None:
        self.m = m

    def new(self) -> Any:
        return T.sblock_alloc_buffer((self.m, self.m), "float32")

    def product(self, a: Any, b: Any, into: Any) -> None:
        with T.grid(self.m, self.m) as (i, j):
            T.buffer_store(into, f32(0.0), [i, j])
            with T.serial(0, self.m) as x:
                T.buffer_store(into, into[i, j] + a[i, x] * b[x, j], [i, j])

    def less(self, diagonal: float, a: Any, into: Any) -> None:
        """into = diagonal I - a."""
        with T.grid(self.m, self.m) as (i, j):
            own = tirx.if_then_else(i == j, f32(diagonal), f32(0.0))
            T.buffer_store(into, own - a[i, j], [i, j])

    def times(self, factor: Any, a: Any, into: Any) -> None:
        with T.grid(self.m, self.m) as (i, j):
            T.buffer_store(into, a[i, j] * factor, [i, j])


def pseudo_inverse(scale: float, steps: int, q: Any, k: Any, w: Any, *rest: Any) -> None:
    """A^+ w, A = softmax(scale q k^T): q [B, H, m, D], k [B, G, m, D], w [B, H, m, E].

    Perhaps a bool mask [B or 1, m] of the columns of A; [B, H, m, E]. `steps` of the iteration
    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from A^T over the largest column sum.
    """
    mask, out = (rest[0] if len(rest) == 2 else None), rest[-1]
    b_, h_, m_, _ = (int(n) for n in q.shape)
    on, group = _Square(m_), h_ // int(k.shape[1])
    a, z, p, x, y = (on.new() for _ in range(5))
    with T.grid(b_, h_) as (b, h):
        _softmax(scale, q, k, mask, a, (b, h, h // group))
        _start(a, z, m_)
        with T.serial(0, steps):
            on.product(a, z, p)
            on.less(7.0, p, x)
            for diagonal in (15.0, 13.0):
                on.product(p, x, y)
                on.less(diagonal, y, x)
            on.product(z, x, y)
            on.times(f32(0.25), y, z)
        with T.grid(m_, int(w.shape[3])) as (i, e):
            T.buffer_store(out, f32(0.0), [b, h, i, e])
            with T.serial(0, m_) as j:
                T.buffer_store(out, out[b, h, i, e] + z[i, j] * w[b, h, j, e], [b, h, i, e])


def _softmax(
    scale: float, q: Any, k: Any, mask: Any, a: Any, at: tuple[Any, Any, Any]
) -> None:  # fmt: skip
    (b, h, g), (m_, d_) = at, (int(n) for n in q.shape[2:])
    row, edge, total = (T.sblock_alloc_buffer((n,), "float32") for n in (d_, 1, 1))
    with T.serial(0, m_) as i:
        with T.serial(0, d_) as d:
            own = q[b, h, i, d]
            T.buffer_store(row, own if scale == 1.0 else own * f32(scale), [d])
        T.buffer_store(edge, f32(MINIMUM), [0])
        T.buffer_store(total, f32(0.0), [0])
        with T.serial(0, m_) as j:
            T.buffer_store(a, f32(0.0), [i, j])
            with T.serial(0, d_) as d:
                T.buffer_store(a, a[i, j] + row[d] * k[b, g, j, d], [i, j])
            if mask is not None:
                hidden = f32(float("-inf"))
                T.buffer_store(a, tirx.Select(one_of(mask, b, j), a[i, j], hidden), [i, j])
            T.buffer_store(edge, tirx.max(edge[0], a[i, j]), [0])
        with T.serial(0, m_) as j:
            T.buffer_store(a, tirx.exp(a[i, j] - edge[0]), [i, j])
            T.buffer_store(total, total[0] + a[i, j], [0])
        T.buffer_store(total, f32(1.0) / tirx.max(total[0], f32(TINY)), [0])
        with T.serial(0, m_) as j:
            T.buffer_store(a, a[i, j] * total[0], [i, j])


def _start(a: Any, z: Any, m_: int) -> None:
    """z = a^T over the largest column sum of a (its rows sum to one)."""
    sums, edge = (T.sblock_alloc_buffer((n,), "float32") for n in (m_, 1))
    T.buffer_store(edge, f32(TINY), [0])
    with T.serial(0, m_) as j:
        T.buffer_store(sums, f32(0.0), [j])
        with T.serial(0, m_) as i:
            T.buffer_store(sums, sums[j] + a[i, j], [j])
        T.buffer_store(edge, tirx.max(edge[0], sums[j]), [0])
    T.buffer_store(edge, f32(1.0) / edge[0], [0])
    with T.grid(m_, m_) as (i, j):
        T.buffer_store(z, a[j, i] * edge[0], [i, j])
