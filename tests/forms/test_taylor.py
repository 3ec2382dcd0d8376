"""taylor: its features are the second order polynomial, near softmax for small logits."""

from __future__ import annotations

import pytest
import torch

from passes.errors import UsageError
from passes.form import form_named
from passes.forms._features import polynomial, polynomial_width
from tests.by_hand import site


@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 16])
def test_features_are_the_polynomial(d: int) -> None:
    x, y = torch.randn(5, d).double(), torch.randn(6, d).double()
    t = x @ y.T
    whole = polynomial(x, low=True) @ polynomial(y, low=True).T
    torch.testing.assert_close(whole, 1 + t + t.square() / 2, rtol=1e-12, atol=1e-12)
    pairs = polynomial(x, low=False, flat=0.3)
    squares = pairs @ polynomial(y, low=False, flat=0.3).T
    torch.testing.assert_close(squares, 0.09 + t.square() / 2)
    assert pairs.shape[-1] == 1 + d * (d + 1) // 2 == polynomial_width(d, low=False)
    assert (whole >= 0.5 - 1e-12).all()


def test_the_whole_head_gives_the_direct_form() -> None:
    at = site(B=1, H=4, G=2, T=6, S=9, D=5, scale=0.4)
    form = form_named("taylor", {"rank": 0})
    params = {n: p.double() for n, p in form.init_params(at).items()}
    q, k = torch.randn(1, 4, 6, 5).double(), torch.randn(1, 2, 9, 5).double()
    v = torch.randn(1, 2, 9, 5).double()
    t = 0.4 * q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    weights = 1 + t + t.square() / 2
    want = weights / weights.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)
    got = form.attend(form.spec(at), params, q, k, v)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_error_against_softmax_is_third_order() -> None:
    at = site(B=1, H=2, T=16, D=8)
    form, exact = form_named("taylor", {"rank": 0}), form_named("exact")
    params = {n: p.double() for n, p in form.init_params(at).items()}
    q, k, v = (torch.randn(1, 2, 16, 8).double() for _ in range(3))

    def error(size: float) -> float:
        a, b = size**0.5 * q, size**0.5 * k
        got = form.attend(form.spec(at), params, a, b, v)
        return float((got - exact.attend(exact.spec(at), {}, a, b, v)).norm())

    assert 6.0 < error(0.1) / error(0.05) < 10.0  # 2^3 for half the logits
    assert error(0.05) < 1e-3


def test_narrow_maps_keep_logits_right_on_average() -> None:
    at = site(B=1, H=64, G=64, D=32)
    params = form_named("taylor").init_params(at)
    assert params["w_q"].shape == (64, 32, 16)
    mean = (params["w_q"] @ params["w_k"].transpose(-1, -2)).mean(0)
    assert (mean.diagonal() - 1).abs().max() < 0.4
    assert abs(float(mean.diagonal().mean()) - 1) < 1e-3
    grouped = form_named("taylor").init_params(site(H=4, G=2, D=32))
    assert torch.equal(grouped["w_q"][1], grouped["w_k"][0])


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="rank"):
        form_named("taylor", {"rank": 1000})
