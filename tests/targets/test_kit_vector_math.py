"""exp, erf and tanh as arithmetic: accuracy over the range, ends, NaN."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te
from tvm.tirx.script.builder import ir as T

from codegen.kernels import vector_math
from codegen.kernels.tiles import build, scratch
from codegen.schedules._exp2 import power_of_two
from codegen.target import Target, target_named


def run(f: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
    a = te.placeholder(x.shape, name="a")
    b = te.compute(x.shape, lambda i: f(a[i]), name="b")
    sch = tvm.s_tir.Schedule(te.create_prim_func([a, b]))
    _, v = sch.split(sch.get_loops(sch.get_sblock("b"))[0], [None, 16])
    sch.vectorize(v)
    lib = tvm.compile(sch.mod, target=tvm.target.Target(dict(target_named("cpu").tvm)))
    out = tvm.runtime.tensor(np.full(x.shape, np.nan, "float32"))
    lib["main"](tvm.runtime.tensor(x), out)
    return out.numpy()


def sample(low: float, high: float) -> np.ndarray:
    rng = np.random.default_rng()
    near = rng.uniform(-0.5, min(high, 0.5), 8000)
    return np.concatenate([rng.uniform(low, high, 8000), near]).astype("float32")


@pytest.mark.parametrize(
    ("name", "exact", "low", "high", "bound"),
    [
        ("vexp", np.exp, -87.3, 88.7, 2e-7),
        ("vexp_nonpositive", np.exp, -87.3, 0.0, 2e-7),
        ("vexp2_weight", np.exp2, -126.0, 126.0, 2e-7),
        ("verf", np.vectorize(math.erf), -6.0, 6.0, 5e-7),
        ("vtanh", np.tanh, -12.0, 12.0, 5e-7),
    ],
)
def test_relative_error(
    name: str, exact: Callable[[Any], Any], low: float, high: float, bound: float
) -> None:
    x = sample(low, high)
    want = exact(x.astype("float64"))
    error = np.abs(run(getattr(vector_math, name), x) - want)
    assert np.all(error <= bound * np.abs(want) + 1e-37)


def test_a_weight_is_exact_beside_one() -> None:
    x = np.append(sample(-87.3, 0.0), np.float32(0.0))[-16000:]
    want = np.exp(x.astype("float64"))
    got = run(vector_math.vexp_weight, x)
    assert np.all(np.abs(got - want) <= 2e-7 * want + 1e-8)
    assert got[-1] == 1


def test_ends() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0, 88.72, 88.8, -88.5, -1e38] * 2, "float32")
    y = run(vector_math.vexp, x)
    assert np.isnan(y[0])
    assert list(y[1:4]) == [np.inf, 0, 1]
    assert np.isfinite(y[4])
    assert list(y[5:8]) == [np.inf, 0, 0]
    x = np.array([np.nan, -np.inf, 0, -88.5, -1e38, -104, -3e38, -87.8] * 2, "float32")
    for f in (vector_math.vexp_nonpositive, vector_math.vexp_weight):
        y = run(f, x)
        assert np.isnan(y[0])
        assert list(y[1:8]) == [0, 1, 0, 0, 0, 0, 0]
    x = np.array([np.nan, np.inf, -np.inf, 0] * 4, "float32")
    for f in (vector_math.verf, vector_math.vtanh):
        y = run(f, x)
        assert np.isnan(y[0])
        assert list(y[1:4]) == pytest.approx([1, -1, 0], abs=2e-7)


def powers(x: np.ndarray, target: Target) -> np.ndarray:
    """2^x by vectors of the target."""
    rows = x.reshape(-1, target.lanes)
    a = te.placeholder(rows.shape, name="a")
    func = te.create_prim_func([a, te.compute(rows.shape, lambda *i: a[i], name="b")])

    def body(given: Any, out: Any) -> None:
        with T.serial(0, len(rows)) as i:
            row = scratch(1, target.lanes)
            with T.vectorized(0, target.lanes) as j:
                T.buffer_store(row, given[i, j], [0, j])
            power_of_two(target)(row, 0)
            with T.vectorized(0, target.lanes) as j:
                T.buffer_store(out, row[0, j], [i, j])

    mod = tvm.IRModule({"main": build(func, body)})
    lib = tvm.compile(mod, target=tvm.target.Target(dict(target.tvm)))
    out = tvm.runtime.tensor(np.full(rows.shape, np.nan, "float32"))
    lib["main"](tvm.runtime.tensor(rows), out)
    return out.numpy().ravel()


@pytest.mark.parametrize("features", [None, ()])
def test_powers_of_two_in_place(features: tuple[str, ...] | None) -> None:
    """By the instructions of AVX-512, where there are any, and by arithmetic."""
    target = target_named("cpu")
    if features is not None:
        target = dataclasses.replace(target, features=features)
    ends = np.array([np.nan, -np.inf, -160, -1e38, 0, 1, -1, 100] * 2, "float32")
    x = np.append(sample(-126.0, 126.0), ends)
    y = powers(x, target)
    want = np.exp2(x[:-16].astype("float64"))
    assert np.all(np.abs(y[:-16] - want) <= 2e-7 * want)
    assert np.isnan(y[-16])
    assert list(y[-15:-9]) == [0, 0, 0, 1, 2, 0.5]
    assert y[-9] == np.float32(2.0**100)
