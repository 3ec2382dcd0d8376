"""Softmax attention through the kit, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.kit_tools import Case, trial

CASES = [
    Case(),
    Case(T=1, S=1, D=3, E=2),
    Case(T=1, S=70, D=40, E=40),
    Case(B=2, T=17, S=50, D=80, E=24, H=4, G=2),
    Case(T=9, S=100, D=128, E=64, H=3, G=1),
    Case(T=64, S=64, D=64, E=48),
    Case(T=40, S=40, causal=True),
    Case(T=5, S=37, causal=True, H=4),
    Case(T=37, S=5, causal=True, E=7),
    Case(T=1, S=130, causal=True),
    Case(T=50, S=50, window=(3, 4)),
    Case(T=70, S=90, window=(5, 0), causal=True, E=20),
    Case(B=2, T=20, S=45, key_rows=2),
    Case(B=2, T=20, S=64, key_rows=1, causal=True),
    Case(B=2, T=33, S=33, bias=(2, 2, 33, 33)),
    Case(T=20, S=64, bias=(1, 1, 20, 64)),
    Case(T=20, S=31, bias=(2, 1, 31)),
    Case(B=2, T=20, S=31, bias=(2, 1, 1, 31), bias_bool=True),
    Case(T=20, S=64, H=4, bias=(64,), bias_bool=True, causal=True, key_rows=1),
    # Several blocks of keys: the softmax is put together from them.
    Case(T=40, S=1100, D=16, E=40),
    Case(T=9, S=700, D=16, E=16, causal=True, key_rows=1),
    Case(T=700, S=700, H=1, G=1, D=8, E=8, causal=True),
    Case(T=700, S=700, H=1, G=1, D=8, E=8, window=(330, 20)),
    Case(T=33, S=600, D=8, E=8, H=4, bias=(4, 33, 600)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case) -> None:
    t = trial("exact", case, np.random.default_rng())
    built = t.build()
    assert [k.scheduled_by for k in built.kernels] == ["attention"]
    np.testing.assert_allclose(t.run(built), t.reference(), atol=2e-5, rtol=0)


def test_rows_that_see_no_key_are_zero() -> None:
    rng = np.random.default_rng()
    t = trial("exact", Case(B=2, key_rows=2), rng)
    t.arrays["key_mask"][1] = False
    y = t.run()
    assert np.all(y[1] == 0)
    assert np.all(np.abs(y[0]).sum(-1) > 0)
    t = trial("exact", Case(bias=(1, 1, 33, 33)), rng)
    t.arrays["bias"][0, 0, 4] = -np.inf
    y = t.run()
    assert np.all(y[0, :, 4] == 0)
    assert np.all(np.abs(y[0, :, 5]).sum(-1) > 0)


def test_a_row_at_the_lowest_float_averages_as_torch_does() -> None:
    t = trial("exact", Case(T=6, S=20, bias=(1, 1, 6, 20)), np.random.default_rng())
    t.arrays["bias"][0, 0, 2] = np.finfo("float32").min
    mean = t.arrays["v"].mean(2)
    np.testing.assert_allclose(t.run()[:, :, 2], mean, atol=1e-5)


def test_nan_reaches_the_rows_it_concerns_and_no_others() -> None:
    t = trial("exact", Case(T=20, S=40), np.random.default_rng())
    t.arrays["q"][0, 1, 7, 3] = np.nan
    bad = np.isnan(t.run())
    assert bad[0, 1, 7].all()
    assert bad.sum() == bad[0, 1, 7].size
    t = trial("exact", Case(T=20, S=40), np.random.default_rng())
    t.arrays["k"][0, 0, 39, 0] = np.nan
    bad = np.isnan(t.run())
    assert bad[0, 0].all()
    assert not bad[0, 1].any()
    t = trial("exact", Case(T=20, S=40), np.random.default_rng())
    t.arrays["v"][0, 0, 0, 5] = np.nan
    bad = np.isnan(t.run())
    assert bad[0, 0, :, 5].all()
    assert bad.sum() == 20


def test_future_keys_do_not_leak() -> None:
    t = trial("exact", Case(T=40, S=40, causal=True), np.random.default_rng())
    built = t.build()
    before = t.run(built)
    t.arrays["k"][:, :, 21:], t.arrays["v"][:, :, 21:] = 1e3, -1e3
    after = t.run(built)
    # Not to the bit: longer keys may send a task, and all its rows, to the true maxima.
    np.testing.assert_allclose(before[:, :, :21], after[:, :, :21], atol=2e-6, rtol=0)
    assert np.abs(before[:, :, 21:] - after[:, :, 21:]).max() > 1


@pytest.mark.parametrize("masked", [False, True])
def test_rows_far_below_their_bound_are_done_again(masked: bool) -> None:
    """|q| |k| is far from every logit: queries are nearly orthogonal to long keys."""
    t = trial("exact", Case(B=2, T=40, S=90, key_rows=2 if masked else 0), np.random.default_rng())
    t.arrays["q"][:, :, 20:, 0] = 4e3
    t.arrays["k"][..., 0] = 0.0
    t.arrays["k"][:, :, 3, 0] = -1e3
    y = t.run()
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, t.reference(), atol=1e-3, rtol=0)
    np.testing.assert_allclose(y[:, :, :16], t.reference()[:, :, :16], atol=2e-5, rtol=0)


def test_large_logits_do_not_overflow() -> None:
    t = trial("exact", Case(T=10, S=30), np.random.default_rng())
    t.arrays["q"] *= 300
    np.testing.assert_allclose(t.run(), t.reference(), atol=1e-3)
    assert np.isfinite(t.run()).all()


def test_float16_data_has_float32_sums() -> None:
    t = trial("exact", Case(T=20, S=200, dtype="float16"), np.random.default_rng())
    y = t.run()
    assert y.dtype == np.float16
    np.testing.assert_allclose(y.astype("float64"), t.reference(), atol=2e-3)
