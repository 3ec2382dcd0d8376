"""clipped_softmax: without stretching it is softmax; exact zeros and ones; its kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from passes.errors import UsageError
from passes.form import form_named
from tests.by_hand import site
from tests.targets.kit_tools import Case, Trial, trial


def inputs() -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 4, 11, 6).double()
    return q, torch.randn(2, 2, 13, 6).double(), torch.randn(2, 2, 13, 5).double()


@pytest.mark.parametrize("causal", [False, True])
def test_zeta_one_gamma_zero_is_softmax(causal: bool) -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=11, S=13, D=6, E=5, causal=causal, padding=True)
    mask = torch.rand(2, 13) > 0.3
    form, exact = form_named("clipped_softmax", {"gamma": 0.0}), form_named("exact")
    got = form.attend(form.spec(at), {}, q, k, v, mask)
    want = exact.attend(exact.spec(at), {}, q, k, v, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_small_weights_are_exactly_zero_and_large_ones_one() -> None:
    q, k, _ = inputs()
    at = site(H=4, G=2, T=11, S=13, D=6)
    zeta, gamma = 1.4, -0.06
    form = form_named("clipped_softmax", {"zeta": zeta, "gamma": gamma})
    exact = form_named("exact")
    q = 6 * q
    soft = exact.weights(exact.spec(at), {}, q, k)
    got = form.weights(form.spec(at), {}, q, k)
    low, high = -gamma / (zeta - gamma), (1 - gamma) / (zeta - gamma)
    assert (got[soft < low] == 0).all()
    assert (got[soft > high] == 1).all()
    assert (soft < low).any()
    assert (soft > high).any()
    between = (soft > low) & (soft < high)
    want = (zeta - gamma) * soft + gamma
    torch.testing.assert_close(got[between], want[between], rtol=0, atol=1e-14)


def test_clipped_weights_pass_no_gradient() -> None:
    q, k, v = inputs()
    q.requires_grad_()
    at = site(H=4, G=2, T=11, S=13, D=6, E=5)
    form = form_named("clipped_softmax", {"gamma": -16.0})  # only a weight near one is left
    form.attend(form.spec(at), {}, q, k, v).sum().backward()
    assert q.grad is not None
    assert (q.grad == 0).all()


@pytest.mark.parametrize("case", [Case(T=19, S=33, D=12, E=20, bias=(1, 1, 19, 33)),
                                  Case(T=33, S=70, D=8, E=8, causal=True)], ids=str)  # fmt: skip
def test_kernel_where_much_is_clipped(case: Case) -> None:
    plain = trial("exact", case, np.random.default_rng())
    plain.arrays["q"] *= 3
    form = form_named("clipped_softmax", {"zeta": 1.5, "gamma": -0.1})
    t = Trial(form, case, plain.arrays, {})
    np.testing.assert_allclose(t.run(), t.reference(), atol=2e-5, rtol=0)
    assert np.abs(t.reference()).max() > 0.1


def test_a_row_that_sees_nothing_is_zero() -> None:
    t = trial("clipped_softmax", Case(B=2, key_rows=2), np.random.default_rng())
    t.arrays["key_mask"][1] = False
    got = t.run()
    assert (got[1] == 0).all()
    assert (np.abs(got[0]).sum(-1) > 0).all()


@pytest.mark.parametrize("config", [{"zeta": 0.9}, {"gamma": 0.1}, {"gamma": "0"}])
def test_bad_options(config: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(config))):
        form_named("clipped_softmax", config)
