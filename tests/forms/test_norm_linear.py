"""norm_linear: three ways of computing it agree, its norm and its bounded gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passes.form import form_named
from passes.forms._linear import linear_attention
from passes.forms.norm_linear import NORM_EPS
from tests.by_hand import site


def phi(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.exp())


def normed(x: Tensor) -> Tensor:
    """x [B, H, T, E] over the root of its mean square over heads and channels."""
    flat = x.transpose(1, 2).flatten(2)
    flat = flat / (flat.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
    return flat.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)


@pytest.mark.parametrize(("queries", "keys"), [(130, 130), (7, 70)])
@pytest.mark.parametrize("padding", [False, True])
def test_chunks_equal_the_quadratic_form_and_the_recurrence(
    queries: int, keys: int, padding: bool
) -> None:
    form = form_named("norm_linear")
    at = site(B=2, H=4, G=2, T=queries, S=keys, D=5, E=3, causal=True, padding=padding)
    q, k = torch.randn(2, 4, queries, 5).double(), torch.randn(2, 2, keys, 5).double()
    v = torch.randn(2, 2, keys, 3).double()
    key_mask = torch.rand(2, keys) > 0.4 if padding else None
    got = form.attend(form.spec(at), {}, q, k, v, key_mask)
    weights = form.weights(form.spec(at), {}, q, k, key_mask)
    wide = v.repeat_interleave(2, 1)
    torch.testing.assert_close(got, normed(weights @ wide), rtol=1e-10, atol=1e-10)
    state, rows = torch.zeros(2, 4, 5, 3).double(), []
    fk = phi(k).repeat_interleave(2, 1)
    fk = fk if key_mask is None else fk * key_mask[:, None, :, None]
    for j in range(keys):
        state = state + fk[:, :, j, :, None] * wide[:, :, j, None]
        if j >= keys - queries:
            rows.append((phi(q[:, :, j - keys + queries])[..., None] * state).sum(-2))
    torch.testing.assert_close(got, normed(torch.stack(rows, 2)), rtol=1e-10, atol=1e-10)


def test_bidirectional_formula() -> None:
    form, at = form_named("norm_linear"), site(B=1, H=2, T=5, S=9, D=4)
    q, k, v = (torch.randn(1, 2, n, 4).double() for n in (5, 9, 9))
    got = form.attend(form.spec(at), {}, q, k, v)
    want = normed(phi(q) @ phi(k).transpose(-1, -2) @ v)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    size = got.transpose(1, 2).flatten(2).square().mean(-1)
    torch.testing.assert_close(size, torch.ones(1, 5).double(), rtol=1e-3, atol=0)


def test_gradients_stay_bounded_where_a_denominator_s_do_not() -> None:
    """As features shrink, the quotient's gradient explodes, the norm's goes to 1/sqrt(eps)."""
    form, at = form_named("norm_linear"), site(B=1, H=1, T=12, D=4)
    k, v, into = (torch.randn(1, 1, 12, 4).double() for _ in range(3))
    shape = torch.rand(1, 1, 12, 4).double() + 0.1

    def largest(power: int, norm: bool) -> float:
        features = (shape * 10.0**-power).requires_grad_()
        if norm:
            out = form.attend(form.spec(at), {}, features.log(), k, v)  # phi(log f) = f for f < 1
        else:
            out = linear_attention(features, phi(k), v, eps=1e-300)
        (out * into).sum().backward()
        assert features.grad is not None
        return float(features.grad.abs().max())

    assert largest(12, norm=False) > 0.9e6 * largest(6, norm=False)
    assert largest(12, norm=True) < 1.1 * largest(6, norm=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_sums_do_not_overflow(dtype: torch.dtype) -> None:
    form, at = form_named("norm_linear"), site(B=1, H=1, T=3, S=2000, D=8)
    q, k, v = (torch.full((1, 1, n, 8), 20.0, dtype=dtype) for n in (3, 2000, 2000))
    out = form.attend(form.spec(at), {}, q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), torch.ones(1, 1, 3, 8))
