"""favor: an unbiased estimate whose error falls with features, orthogonal below Monte Carlo."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from passes.errors import UsageError
from passes.form import form_named
from passes.forms import _random
from passes.forms._features import exp_key
from tests.by_hand import site

D = 8


def vectors(size: float = 0.7) -> tuple[Tensor, Tensor]:
    """q and k [1, 6, 8] of about the given length."""
    made = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 1, 6, D, generator=made, dtype=torch.float64) for _ in range(2))
    return size * q / q.norm(dim=-1, keepdim=True), size * k / k.norm(dim=-1, keepdim=True)


def estimates(q: Tensor, k: Tensor, draws: int, features: int, orthogonal: bool) -> Tensor:
    """[draws, 6, 6] estimates of exp(q.k), the features' scale undone."""
    draw = _random.orthogonal if orthogonal else _random.gaussian
    out = []
    for seed in range(draws):
        w = draw(D, features, seed)
        fq, fk = (exp_key(x[0] @ w, x[0], 1.0, 0.0) for x in (q, k))
        out.append((fq @ fk.transpose(-1, -2) / features)[0])
    return torch.stack(out)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_the_estimate_is_unbiased(orthogonal: bool) -> None:
    q, k = vectors()
    truth = (q @ k.transpose(-1, -2)).exp()[0, 0]
    found = estimates(q, k, 1500, 16, orthogonal)
    error = found.mean(0) - truth
    spread = found.std(0) / math.sqrt(found.shape[0])
    assert (error.abs() < 5 * spread).all()
    assert (error.abs() / truth < 0.03).all()


def test_error_falls_with_features_and_orthogonal_is_below_monte_carlo() -> None:
    q, k = vectors()
    truth = (q @ k.transpose(-1, -2)).exp()[0, 0]

    def mean_square(features: int, orthogonal: bool) -> float:
        found = estimates(q, k, 400, features, orthogonal)
        return float((found - truth).square().mean())

    plain = {m: mean_square(m, False) for m in (8, 32, 128)}
    better = {m: mean_square(m, True) for m in (8, 32, 128)}
    for m in (8, 32, 128):
        assert better[m] < 0.9 * plain[m]
    for errors in (plain, better):  # variance in proportion to 1 / features
        assert 2.5 < errors[8] / errors[32] < 6.5
        assert 2.5 < errors[32] / errors[128] < 6.5


def test_attention_comes_near_softmax_with_features() -> None:
    q, k = vectors(1.5)
    v = torch.randn(1, 1, 6, D).double()
    at = site(B=1, H=1, T=6, D=D, scale=0.8)
    exact = form_named("exact")
    want = exact.attend(exact.spec(at), {}, q, k, v)

    def error(features: int) -> float:
        total = 0.0
        for seed in range(12):
            form = form_named("favor", {"features": features, "seed": seed})
            params = {n: p.double() for n, p in form.init_params(at).items()}
            out = form.attend(form.spec(at), params, q, k, v)
            total += float((out - want).square().mean())
        return total

    few, many = error(16), error(1024)
    assert many < few / 5
    assert many / 12 < 0.1 * float(want.square().mean())


def test_stabilisers_cancel_and_no_sequence_touches_another() -> None:
    form, at = form_named("favor"), site(B=3, H=2, G=1, T=5, D=D)
    params = {n: p.double() for n, p in form.init_params(at).items()}
    q, k, v = torch.randn(3, 2, 5, D), torch.randn(3, 1, 5, D), torch.randn(3, 1, 5, D)
    q, k, v = q.double(), k.double(), v.double()
    spec = form.spec(at)
    whole = form.attend(spec, params, q, k, v)
    big = k.clone()
    big[1] *= 30.0
    moved = form.attend(spec, params, q, big, v)
    torch.testing.assert_close(moved[[0, 2]], whole[[0, 2]], rtol=0, atol=0)
    root = spec.scale**0.5
    fq, fk = (
        ((x @ params["w"][0]) * root - (x * root).square().sum(-1, keepdim=True) / 2).exp()
        for x in (q, k)
    )
    weights = fq @ fk.transpose(-1, -2)
    want = (weights / weights.sum(-1, keepdim=True)) @ v
    torch.testing.assert_close(whole, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("kind", ["exp", "relu"])
def test_any_size_stays_finite(size: float, kind: str) -> None:
    form, at = form_named("favor", {"kind": kind}), site(B=1, H=2, T=9, D=D)
    q, k, v = (size * torch.randn(1, 2, 9, D) for _ in range(3))
    q.requires_grad_()
    out = form.attend(form.spec(at), form.init_params(at), q, k, v)
    out.sum().backward()
    assert out.isfinite().all()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_draws_are_orthogonal_fixed_by_the_seed_and_differ_by_group() -> None:
    at = site(H=4, G=2, D=16)
    first, again, other = (form_named("favor", {"seed": s}).init_params(at)["w"] for s in (0, 0, 1))
    assert first.shape == (2, 16, 48)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first[0], first[1])
    block = first[0, :, :16]
    gram = block.T @ block
    assert (gram - gram.diag().diag()).abs().max() < 1e-4
    assert abs(float(first.square().sum(1).mean()) / 16 - 1) < 0.25


@pytest.mark.parametrize(
    "config", [{"features": -1}, {"features": 2.5}, {"kind": "sin"}, {"seed": -3}]
)
def test_bad_options(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(config))):
        form_named("favor", config)
