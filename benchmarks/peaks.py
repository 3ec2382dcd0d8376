"""The machine's own limits, measured through TVM: fused multiply-adds and memory bandwidth.

The kernel of the first keeps 8 x 2 vectors in registers and its operands in the first-level
cache; that of the second streams three arrays far larger than the caches.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from codegen import tvm_env
from codegen.target import target_named

ROWS, DEPTH, SWEEPS = 8, 128, 4000
FLOATS = 40_000_000  # of each of the three streamed arrays: 160 MB


@dataclass(frozen=True)
class Peaks:
    """float32 GFLOP/s (a fused multiply-add is two) and GB/s, the best of several runs."""

    gflops: float
    gbytes: float
    threads: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(threads: int, seconds: float = 1.0, floats: int = FLOATS) -> Peaks:
    """Both limits with `threads` threads (TVM_NUM_THREADS of this process, set before)."""
    tile = _Tile(threads)
    stream = _Stream(threads, floats)
    tile.check()
    stream.check()
    return Peaks(
        gflops=tile.flops / _best(tile.run, seconds) / 1e9,
        gbytes=stream.bytes / _best(stream.run, seconds) / 1e9,
        threads=threads,
    )


def _best(run: Any, seconds: float) -> float:
    run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _compile(sch: Any) -> Any:
    import tvm

    target = target_named("cpu")
    return tvm.compile(sch.mod, target=tvm_env.tvm_target(target)).jit()


class _Tile:
    """c[t, i, j] = sum over sweeps and k of a[t, k, i] * b[t, k, j], all of it in registers."""

    def __init__(self, threads: int) -> None:
        from tvm import te
        from tvm.s_tir import Schedule

        lanes = target_named("cpu").lanes
        columns = 2 * lanes
        a = te.placeholder((threads, DEPTH, ROWS), "float32", name="a")
        b = te.placeholder((threads, DEPTH, columns), "float32", name="b")
        sweep = te.reduce_axis((0, SWEEPS), "sweep")
        k = te.reduce_axis((0, DEPTH), "k")
        c = te.compute(
            (threads, ROWS, columns),
            lambda t, i, j: te.sum(a[t, k, i] * b[t, k, j], axis=[sweep, k]),
            name="tile",
        )
        sch = Schedule(te.create_prim_func([a, b, c]))
        block = sch.get_sblock("tile")
        written = sch.cache_write(block, 0, "global")
        t, i, j, sweeps, depth = sch.get_loops(block)
        outer, inner = sch.split(j, [None, lanes])
        sch.reorder(t, sweeps, depth, i, outer, inner)
        sch.reverse_compute_at(written, t)
        sch.parallel(t)
        sch.unroll(i)
        sch.unroll(outer)
        sch.vectorize(inner)
        sch.vectorize(sch.get_loops(written)[-1])
        sch.decompose_reduction(block, sweeps)
        self._call = _compile(sch)
        draw = np.random.default_rng(0)
        self._arrays = [
            draw.standard_normal((threads, DEPTH, n)).astype(np.float32) for n in (ROWS, columns)
        ]
        self._arrays.append(np.full((threads, ROWS, columns), np.nan, np.float32))
        self._tensors = _tensors(self._arrays)
        self.flops = 2 * threads * ROWS * columns * DEPTH * SWEEPS

    def run(self) -> None:
        self._call(*self._tensors)

    def check(self) -> None:
        """The kernel did all its work: the result is the product times the sweeps."""
        self.run()
        a, b, c = (x.astype(np.float64) for x in self._arrays)
        want = SWEEPS * np.einsum("tki,tkj->tij", a, b)
        np.testing.assert_allclose(c, want, atol=1e-3 * float(np.abs(want).max()))


class _Stream:
    """c = a + 3 b over arrays that fit no cache; counted: two reads and one write."""

    def __init__(self, threads: int, floats: int) -> None:
        from tvm import te
        from tvm.s_tir import Schedule

        lanes = target_named("cpu").lanes
        size = threads * lanes * max(1, floats // (threads * lanes))
        a = te.placeholder((size,), "float32", name="a")
        b = te.placeholder((size,), "float32", name="b")
        c = te.compute((size,), lambda i: a[i] + b[i] * 3.0, name="stream")
        sch = Schedule(te.create_prim_func([a, b, c]))
        (i,) = sch.get_loops(sch.get_sblock("stream"))
        t, _, inner = sch.split(i, [threads, None, lanes])
        sch.parallel(t)
        sch.vectorize(inner)
        self._call = _compile(sch)
        self._arrays = [np.full(size, value, np.float32) for value in (1.0, 2.0, np.nan)]
        self._tensors = _tensors(self._arrays)
        self.bytes = 3 * 4 * size

    def run(self) -> None:
        self._call(*self._tensors)

    def check(self) -> None:
        self.run()
        assert (self._arrays[2] == 7.0).all()


def _tensors(arrays: list[Any]) -> list[Any]:
    """TVM tensors over the same memory where it is aligned, else the arrays are replaced."""
    from codegen.input_check import aligned_copy
    from codegen.tvm_runtime import load_ffi

    arrays[:] = [aligned_copy(x, x.dtype) for x in arrays]
    return [load_ffi().from_dlpack(x) for x in arrays]


def main() -> None:
    """Print the peaks as JSON: ``python -m benchmarks.peaks THREADS`` in a process of its own."""
    import json
    import os
    import sys

    threads = int(sys.argv[1])
    os.environ["TVM_NUM_THREADS"] = str(threads)
    print(json.dumps(measure(threads).to_json()))


if __name__ == "__main__":
    main()
