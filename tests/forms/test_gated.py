"""gated: an open gate is softmax, a shut one nothing; the kernel, also in half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from passes.errors import UsageError
from passes.form import form_named
from tests.by_hand import site
from tests.targets.kit_tools import Case, Trial, trial


def inputs() -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 4, 9, 6).double()
    return q, torch.randn(2, 2, 11, 6).double(), torch.randn(2, 2, 11, 5).double()


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("causal", [False, True])
def test_an_open_gate_is_softmax(share: float, causal: bool) -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=9, S=11, D=6, E=5, causal=causal, padding=True)
    mask = torch.rand(2, 11) > 0.3
    form, exact = form_named("gated", {"share": share}), form_named("exact")
    params = {n: p.double() for n, p in form.init_params(at).items()}
    params["w"].zero_()
    params["b"].fill_(float(np.log(share / (1 - share))))
    got = form.attend(form.spec(at), params, q, k, v, mask)
    want = exact.attend(exact.spec(at), {}, q, k, v, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_it_starts_almost_open_and_can_shut() -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=9, S=11, D=6, E=5)
    form, exact = form_named("gated"), form_named("exact")
    params = {n: p.double() for n, p in form.init_params(at).items()}
    want = exact.attend(exact.spec(at), {}, q, k, v)
    assert (form.attend(form.spec(at), params, q, k, v) - want).norm() < 0.1 * want.norm()
    params["b"].fill_(-800.0)
    assert (form.attend(form.spec(at), params, q, k, v) == 0).all()


def test_formula() -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=9, S=11, D=6, E=5)
    form, exact = form_named("gated", {"share": 0.25}), form_named("exact")
    params = {"w": torch.randn(4, 6).double(), "b": torch.randn(4, 1).double()}
    soft = exact.attend(exact.spec(at), {}, q, k, v)
    logit = (q * params["w"][:, None]).sum(-1) + params["b"]
    want = soft * (4 / (1 + (-logit).exp()))[..., None]
    got = form.attend(form.spec(at), params, q, k, v)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_kernel_shuts_without_overflow() -> None:
    case = Case(B=2, H=4, G=2, T=9, S=21, D=12, E=20)
    t = trial("gated", case, np.random.default_rng())
    t.params["b"][:2] = -200.0
    t.params["b"][2:] = 200.0
    got = t.run()
    assert np.isfinite(got).all()
    assert np.abs(got[:, :2]).max() < 1e-30
    np.testing.assert_allclose(got, t.reference(), atol=2e-5, rtol=0)


def test_the_kernel_in_half_precision() -> None:
    case = Case(B=2, H=4, G=2, T=9, S=21, D=12, E=20, dtype="float16")
    plain = trial("gated", case, np.random.default_rng())
    half = {n: p.astype("float16") for n, p in plain.params.items()}
    t = Trial(plain.form, case, plain.arrays, half)
    np.testing.assert_allclose(t.run(), t.reference(), atol=4e-3, rtol=0)


@pytest.mark.parametrize("share", [0.0, 1.0, "half"])
def test_bad_options(share: object) -> None:
    with pytest.raises(UsageError, match="share"):
        form_named("gated", {"share": share})
