"""The window and linear hybrid: compiled equals torch, and its count equals the form's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from passes.form import form_named
from tests.targets.kit_tools import Case, Trial, trial, with_target

CASES = [
    (Case(T=29, S=29, D=16, E=16), {"window": 8}),
    (Case(B=2, H=4, G=2, T=40, S=40, D=24, E=20, causal=True), {"window": 8, "feature_dim": 11}),
    (Case(B=2, T=33, S=33, key_rows=2), {"window": 5}),
    (Case(T=150, S=150, H=4, G=1, D=16, causal=True, key_rows=1), {"window": 16}),
]


def hybrid(case: Case, config: dict[str, Any]) -> Trial:
    rng = np.random.default_rng()
    form, arrays = form_named("lolcats", config), trial("elu", case, rng).arrays
    params = {
        n: (p.numpy() + 0.3 * rng.normal(size=p.shape)).astype("float32")
        for n, p in form.init_params(case.site).items()
    }
    return Trial(form, case, arrays, params)


@pytest.mark.parametrize(("case", "config"), CASES, ids=lambda x: str(x))
def test_kernel_equals_module_and_count_equals_ops(case: Case, config: dict[str, Any]) -> None:
    t = hybrid(case, config)
    built = t.build()
    np.testing.assert_allclose(t.run(built), t.reference(), atol=2e-5, rtol=0)
    assert {k.scheduled_by for k in built.kernels} == {"hybrid", "project", "feature_map"}
    assert built.ops.to_json() == t.form.ops(case.site).to_json()


def test_narrow_vectors_give_the_same() -> None:
    t = with_target(hybrid(*CASES[0]), vector_bytes=16)
    np.testing.assert_allclose(t.run(), t.reference(), atol=2e-5, rtol=0)


def test_a_query_without_visible_keys_gives_zero() -> None:
    t = hybrid(Case(B=2, T=33, S=33, key_rows=2), {"window": 5})
    t.arrays["key_mask"][0] = False
    t.arrays["key_mask"][1, :15] = False  # all keys near the first queries, not those far away
    t.arrays["key_mask"][1, 15:] = True
    out = t.run()
    assert (out[0] == 0).all()
    np.testing.assert_allclose(out, t.reference(), atol=2e-5, rtol=0)
    assert (out[1] != 0).all()
