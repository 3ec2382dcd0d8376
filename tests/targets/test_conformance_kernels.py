"""Every form: its kernels equal its torch code, and its closed count equals their count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from passes.form import form_named, forms
from passes.forms._features import FeatureForm
from passes.opcount import OpCount
from tests.targets.kit_tools import Case, Trial, trial

CASES = [
    Case(T=24, S=24, D=16, E=16),
    Case(B=2, T=1, S=19, H=4, G=2, D=40, E=24),
    Case(T=70, S=70, D=64, E=64, causal=True),
    Case(B=2, T=13, S=33, D=80, E=80, key_rows=2),
    Case(T=20, S=20, D=32, E=32, key_rows=1, causal=True, H=4, G=1),
    Case(T=20, S=20, D=32, E=8, window=(4, 2)),
    Case(T=20, S=31, D=128, E=128, bias=(1, 2, 20, 31)),
]
# elu and hedgehog run all cases of the sums that these forms share with them.
COVERED = (CASES[0], CASES[2])
PAIRS = [
    (name, case)
    for name, form in forms().items()
    for case in CASES
    if not (issubclass(form, FeatureForm) and case in COVERED)
]


def _of(name: str, case: Case) -> Trial:
    verdict = form_named(name).applies(case.site)
    if not verdict:
        pytest.skip(f"{name} refuses: {verdict}")
    return trial(name, case, np.random.default_rng())


@pytest.mark.parametrize(("name", "case"), PAIRS, ids=lambda x: str(x))
def test_kernel_equals_module_and_count_equals_ops(name: str, case: Case) -> None:
    t = _of(name, case)
    built = t.build()
    want = t.reference()
    # A row with small weights alone is a quotient of roundings, in torch's float32 as well.
    rounding = np.abs(t.reference(torch.float32) - want).max()
    np.testing.assert_allclose(t.run(built), want, atol=max(2e-5, 20 * rounding), rtol=0)
    assert all(k.scheduled_by for k in built.kernels)
    assert _arithmetic(built.ops) == _arithmetic(t.form.ops(case.site))
    assert built.ops.bytes_written == t.form.ops(case.site).bytes_written


def _arithmetic(count: OpCount) -> dict[tuple[str, str], int]:
    return {(op, dtype): n for op, dtype, n in count}


@pytest.mark.parametrize("name", sorted(forms()))
def test_narrow_vectors_give_the_same(name: str) -> None:
    """The schedules of a 128-bit machine (an edge board), run here."""
    from tests.targets.kit_tools import with_target

    t = with_target(_of(name, CASES[0]), vector_bytes=16)
    np.testing.assert_allclose(t.run(), t.reference(), atol=2e-5, rtol=0)
