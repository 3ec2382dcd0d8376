"""relu: the formula, its scale blindness, and rows without positive channels."""

from __future__ import annotations

import torch

from passes.form import form_named
from tests.by_hand import site


def test_the_formula() -> None:
    form, at = form_named("relu"), site(B=1, H=1, T=3, S=4, D=3)
    q, k = torch.randn(3, 3).double().abs(), torch.randn(4, 3).double()
    k[:, 0] = k[:, 0].abs()
    v = torch.randn(4, 3).double()
    scores = q @ k.clamp_min(0).T
    want = scores @ v / scores.sum(-1, keepdim=True)
    got = form.attend(form.spec(at), {}, q[None, None], k[None, None], v[None, None])
    torch.testing.assert_close(got[0, 0], want, rtol=1e-4, atol=1e-4)  # the floor


def test_it_is_blind_to_the_size_of_query_and_key() -> None:
    form, at = form_named("relu"), site(B=1, H=2, T=6, D=4)
    q, k, v = (torch.rand(1, 2, 6, 4).double() + 0.1 for _ in range(3))
    out = form.attend(form.spec(at), {}, q, k, v)
    torch.testing.assert_close(
        form.attend(form.spec(at), {}, 1e3 * q, 1e4 * k, v), out, rtol=1e-4, atol=1e-4
    )


def test_a_query_without_positive_channels_averages() -> None:
    form, at = form_named("relu"), site(B=1, H=1, T=5, D=4)
    q = -torch.rand(1, 1, 5, 4).double()
    k = torch.full((1, 1, 5, 4), 2.0).double()
    v = torch.randn(1, 1, 5, 4).double()
    out = form.attend(form.spec(at), {}, q, k, v)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(1, 1, 5, 4))
