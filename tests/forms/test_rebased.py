"""rebased: its features are the squared product of normed maps, which can be learned to be 0."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from passes.errors import UsageError
from passes.form import Reason, form_named
from passes.forms.rebased import FLOOR
from tests.by_hand import site


def test_the_formula_per_head_and_group() -> None:
    form, at = form_named("rebased", {"rank": 4}), site(B=1, H=4, G=2, T=3, S=5, D=6, E=2)
    q, k = torch.randn(1, 4, 3, 6).double(), torch.randn(1, 2, 5, 6).double()
    v = torch.randn(1, 2, 5, 2).double()
    params = {n: torch.randn(p.shape).double() for n, p in form.init_params(at).items()}
    got = form.attend(form.spec(at), params, q, k, v)

    def mapped(x: torch.Tensor, name: str, head: int) -> torch.Tensor:
        gamma, beta = params[f"gamma_{name}"][head], params[f"beta_{name}"][head]
        return F.layer_norm(x @ params[f"w_{name}"][head], (4,), gamma, beta)

    for h in range(4):
        t = mapped(q[0, h], "q", h) @ mapped(k[0, h // 2], "k", h // 2).T
        weights = t.square() + FLOOR * 4
        want = weights / weights.sum(-1, keepdim=True) @ v[0, h // 2]
        torch.testing.assert_close(got[0, h], want, rtol=1e-8, atol=1e-8)


def test_a_weight_can_be_zero() -> None:
    form, at = form_named("rebased"), site(B=1, H=1, T=1, S=2, D=4)
    params = {n: p.double() for n, p in form.init_params(at).items()}
    q = torch.tensor([1.0, -1.0, 1.0, -1.0]).double().reshape(1, 1, 1, 4)
    k = torch.tensor([[1.0, 1.0, -1.0, -1.0], [2.0, -1.0, 0.0, -1.0]]).double()[None, None]
    weights = form.weights(form.spec(at), params, q, k)
    want = torch.tensor([0.0, 1.0]).double()
    torch.testing.assert_close(weights[0, 0, 0], want, rtol=0, atol=2e-3)


def test_small_weights_alone_are_an_average_in_float32_too() -> None:
    """Features are signed: without a floor, rounding would decide the quotient and its sign."""
    form, at = form_named("rebased"), site(B=1, H=1, T=400, S=2, D=16)
    params = form.init_params(at)
    k, v = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2, 16)
    normed = F.layer_norm(k[0, 0], (16,))
    q = torch.randn(400, 16)
    q = F.layer_norm(q - q @ torch.linalg.pinv(normed) @ normed, (16,))  # q'.k' = 0
    out = form.attend(form.spec(at), params, q[None, None], k, v)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=0, atol=5e-2)


def test_it_is_blind_to_the_size_of_query_and_key() -> None:
    form, at = form_named("rebased"), site(B=1, H=2, T=6, D=8)
    q, k, v = (torch.randn(1, 2, 6, 8).double() for _ in range(3))
    params = {n: p.double() for n, p in form.init_params(at).items()}
    out = form.attend(form.spec(at), params, q, k, v)
    big = form.attend(form.spec(at), params, 1e3 * q, 1e3 * k, v)
    torch.testing.assert_close(big, out, rtol=1e-2, atol=1e-2)


def test_what_it_refuses() -> None:
    assert form_named("rebased").applies(site(D=1)).reason is Reason.HEAD_DIM
    with pytest.raises(UsageError, match="rank"):
        form_named("rebased", {"rank": 1})
