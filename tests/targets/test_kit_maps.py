"""Forms with feature maps of their own in half precision, where features leave float16's range."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.kit_tools import Case, trial

NAMES = ["taylor", "norm_linear"]


@pytest.mark.parametrize("name", NAMES)
def test_float16(name: str) -> None:
    case = Case(B=2, T=21, S=33, D=24, E=20, dtype="float16", key_rows=2)
    t = trial(name, case, np.random.default_rng())
    t.arrays["q"] *= 4
    t.arrays["k"] *= 4
    out = t.run()
    want = t.reference()
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, want, atol=1e-3 * np.abs(want).max(), rtol=2e-3)


def test_favor_keys_beyond_float16() -> None:
    """A key that is a draw itself has features near exp(|w|^2/2), above 65504."""
    case = Case(H=1, G=1, T=5, S=9, D=32, E=8, dtype="float16")
    t = trial("favor", case, np.random.default_rng())
    root = case.D**0.25
    t.arrays["k"][0, 0] = (root * t.params["w"][0, :, :9]).T
    t.arrays["q"][0, 0] = (root * t.params["w"][0, :, 3:8]).T / 2
    out = t.run()
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, t.reference(), atol=5e-3, rtol=0)
