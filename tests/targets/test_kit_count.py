"""The operation count: hand-made functions, and definition against the kernel that runs."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import te, tirx

from codegen.count import NotCountable, count
from codegen.energy import HOROWITZ_45NM, energy, table_named
from passes.errors import UnknownName
from passes.opcount import OpCount
from tests.targets.kit_tools import Case, trial


def test_matrix_product_with_exp() -> None:
    a, b = te.placeholder((3, 5), name="a"), te.placeholder((5, 7), name="b")
    k = te.reduce_axis((0, 5), name="k")
    c = te.compute((3, 7), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="c")
    d = te.compute((3, 7), lambda i, j: tirx.exp(c[i, j] - a[i, (j * 2 + 1) % 5]), name="d")
    got = count(te.create_prim_func([a, b, d]))
    want = OpCount.of(mul=105, add=105 + 21, exp=21, read=4 * (15 + 35), written=4 * 21)
    assert got == want


def test_select_and_max_and_bytes_by_type() -> None:
    a = te.placeholder((6,), name="a", dtype="float16")
    m = te.placeholder((6,), name="m", dtype="bool")

    def f(i: object) -> object:
        x = tirx.Cast("float32", a[i])
        return tirx.Select(m[i], tirx.max(x, tirx.const(0.0, "float32")), x / (x + 1.0))

    got = count(te.create_prim_func([a, m, te.compute((6,), f, name="o")]))
    assert got == OpCount.of(select=6, max=6, div=6, add=6, read=12 + 6, written=24)


def test_a_dynamic_extent_is_refused() -> None:
    n = te.var("n")
    a = te.placeholder((n,), name="a")
    f = te.create_prim_func([a, te.compute((n,), lambda i: a[i] * 2.0, name="o")])
    with pytest.raises(NotCountable, match="not a number"):
        count(f)


def test_an_unknown_call_is_refused() -> None:
    a = te.placeholder((4,), name="a")
    f = te.create_prim_func([a, te.compute((4,), lambda i: tirx.acosh(a[i]), name="o")])
    with pytest.raises(NotCountable, match="acosh"):
        count(f)


def test_the_kernel_that_runs_does_the_work_of_the_definition() -> None:
    """Sizes that fill every tile: the same products, each exp replaced by its polynomial.

    With a bias: without one there may be a second pass, which the data decides.
    """
    case = Case(T=32, S=64, D=32, E=32, bias=(1, 1, 32, 64))
    built = trial("exact", case, np.random.default_rng()).build()
    (kernel,) = built.kernels
    ran = count(built.scheduled[kernel.name])
    said = kernel.ops
    exps = said.total("exp")
    x = te.placeholder((1,), name="x")
    from codegen.kernels.vector_math import vexp_weight

    one = count(te.create_prim_func([x, te.compute((1,), lambda i: vexp_weight(x[i]), name="y")]))
    assert exps == 2 * 32 * 64
    assert ran.total("exp") == 0
    # One division for a row, then products, instead of a division for each output.
    rows, outputs = 2 * 32, 2 * 32 * 32
    assert ran.total("mul") == said.total("mul") + exps * one.total("mul") + outputs
    assert (ran.total("div"), said.total("div")) == (rows, outputs)


def test_energy_prices_arithmetic_and_bytes_and_names_the_rest() -> None:
    e = energy(OpCount.of(mul=10, add=100, exp=3, read=16, written=8))
    assert e.arithmetic == pytest.approx({"mul:float32": 37.0, "add:float32": 90.0})
    assert e.memory == pytest.approx(24 * HOROWITZ_45NM.per_byte)
    assert e.unpriced == {"exp:float32": 3}
    assert e.total == pytest.approx(127.0 + e.memory)
    assert table_named("horowitz-45nm") is HOROWITZ_45NM
    with pytest.raises(UnknownName, match="energy table"):
        table_named("horowitz-54nm")
