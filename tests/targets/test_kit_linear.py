"""Linear attention and feature maps through the kit, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.kit_tools import Case, trial

CASES = [
    Case(),
    Case(T=1, S=1, D=3, E=2),
    Case(T=1, S=70, D=40, E=16),
    Case(B=2, T=17, S=50, D=80, E=24, H=4, G=2, key_rows=2),
    Case(T=30, S=600, H=1, G=1, E=40, key_rows=1),
    Case(T=9, S=100, D=128, E=64, H=3, G=1),
    Case(T=150, S=150, causal=True, H=4),
    Case(T=64, S=64, causal=True, D=16, E=7),
    Case(T=5, S=37, causal=True, D=5, E=20),
    Case(T=70, S=200, causal=True, key_rows=1),
    Case(T=37, S=5, causal=True),
    Case(T=1, S=1, causal=True),
]


# hedgehog adds the projection and the softmax pair; the sums are the same kernel.
PAIRS = [("elu", c) for c in CASES] + [("hedgehog", c) for c in CASES[1:4] + CASES[8:10]]


@pytest.mark.parametrize(("name", "case"), PAIRS, ids=str)
def test_equals_float64(name: str, case: Case) -> None:
    t = trial(name, case, np.random.default_rng())
    built = t.build()
    assert [k.scheduled_by for k in built.kernels] == ["linear_attention_fused"]
    np.testing.assert_allclose(t.run(built), t.reference(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_see_no_key_are_zero(causal: bool) -> None:
    t = trial("elu", Case(B=2, key_rows=2, causal=causal), np.random.default_rng())
    t.arrays["key_mask"][1] = False
    y = t.run()
    assert np.all(y[1] == 0)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("name", ["elu", "hedgehog"])
@pytest.mark.parametrize("causal", [False, True])
def test_nan_reaches_the_rows_it_concerns(name: str, causal: bool) -> None:
    t = trial(name, Case(T=80, S=80, causal=causal), np.random.default_rng())
    t.arrays["q"][0, 1, 7, 3] = np.nan
    bad = np.isnan(t.run())
    assert bad[0, 1, 7].all()
    assert bad.sum() == bad[0, 1, 7].size
    t.arrays["q"][0, 1, 7, 3] = 0
    t.arrays["k"][0, 0, 70, 0] = np.nan
    bad = np.isnan(t.run())
    assert bad[0, 0, 72:].all()
    assert not bad[0, 1].any()


def test_future_keys_do_not_leak() -> None:
    t = trial("hedgehog", Case(T=100, S=100, causal=True), np.random.default_rng())
    built = t.build()
    before = t.run(built)
    t.arrays["k"][:, :, 70:], t.arrays["v"][:, :, 70:] = 9.0, -1e3
    after = t.run(built)
    np.testing.assert_array_equal(before[:, :, :70], after[:, :, :70])
    assert np.abs(before[:, :, 70:] - after[:, :, 70:]).max() > 1
