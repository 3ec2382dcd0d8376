"""dijiang: its quasi-Monte Carlo set estimates the softmax kernel better than random draws."""

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

D = 16


def kernel_error(q: Tensor, k: Tensor, w: Tensor) -> float:
    """Mean square error of the estimate of exp(q.k) with even weights."""
    fq, fk = (exp_key(x @ w, x, 1.0, 0.0) for x in (q, k))
    truth = (q @ k.T).exp()
    return float((fq @ fk.T / w.shape[1] / truth - 1).square().mean())


@pytest.mark.parametrize("features", [2 * D, 8 * D])
@pytest.mark.parametrize("size", [0.5, 1.0])
def test_kernel_error_is_below_monte_carlo(features: int, size: float) -> None:
    made = torch.Generator().manual_seed(11)
    q, k = (torch.randn(40, D, generator=made, dtype=torch.float64) for _ in range(2))
    q, k = size * q / q.norm(dim=-1, keepdim=True), size * k / k.norm(dim=-1, keepdim=True)
    seeds = range(30)

    def mean(draw: Any) -> float:
        return sum(kernel_error(q, k, draw(D, features, s)) for s in seeds) / len(seeds)

    ours, plain = mean(_random.cosine_points), mean(_random.gaussian)
    assert ours < 0.5 * plain
    assert ours < mean(_random.orthogonal)


def test_directions_are_the_transform_and_its_negative() -> None:
    at = site(H=4, G=2, D=D)
    params = form_named("dijiang").init_params(at)
    assert params["w"].shape == (2, D, 2 * D)
    assert (params["log_weight"] == 0).all()
    w = params["w"][0]
    torch.testing.assert_close(w[:, 0::2], -w[:, 1::2])
    torch.testing.assert_close(w[:, 0::2] / w[:, 0::2].norm(dim=0), _random.dct(D).float())
    lengths = w[:, 0::2].norm(dim=0).sort().values
    torch.testing.assert_close(lengths, _random.length_quantiles(D, D).float())
    assert not torch.equal(params["w"][0], params["w"][1])  # lengths are dealt anew


def test_the_transform_is_orthonormal_and_lengths_are_gaussian() -> None:
    for d in (1, 2, 5, 16):
        torch.testing.assert_close(
            _random.dct(d).T @ _random.dct(d), torch.eye(d).double(), rtol=1e-12, atol=1e-12
        )
        quantiles = _random.length_quantiles(d, 4000)
        torch.testing.assert_close(
            quantiles.square().mean(), torch.tensor(float(d)).double(), rtol=1e-2, atol=0
        )
    made = torch.Generator().manual_seed(0)
    drawn = torch.randn(20000, 5, generator=made, dtype=torch.float64).norm(dim=-1)
    below = (drawn[:, None] < _random.length_quantiles(5, 4)).double().mean(0)
    want = torch.tensor([0.125, 0.375, 0.625, 0.875]).double()
    torch.testing.assert_close(below, want, rtol=0, atol=0.02)


def test_weights_count_features_as_often() -> None:
    """A log weight of ln 2 is the feature taken twice."""
    at = site(B=1, H=2, G=1, T=5, D=4)
    form = form_named("dijiang", {"features": 6})
    params = {n: p.double() for n, p in form.init_params(at).items()}
    q, k, v = torch.randn(1, 2, 5, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    q, k, v = q.double(), k.double(), v.double()
    params["log_weight"][:, 2] = math.log(2.0)
    weighted = form.attend(form.spec(at), params, q, k, v)
    twice = {"w": torch.cat([params["w"], params["w"][..., 2:3]], -1)}
    twice["log_weight"] = torch.zeros(1, 7).double()
    torch.testing.assert_close(
        weighted, form.attend(form.spec(at), twice, q, k, v), rtol=1e-9, atol=1e-9
    )


def test_fitted_weights_lower_the_error() -> None:
    at = site(B=2, H=2, T=24, D=8)
    form, exact = form_named("dijiang"), form_named("exact")
    made = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 2, 24, 8, generator=made) for _ in range(3))
    want = exact.attend(exact.spec(at), {}, q, k, v)
    params = {n: torch.nn.Parameter(p) for n, p in form.init_params(at).items()}
    params["w"].requires_grad_(False)
    optimiser = torch.optim.Adam([params["log_weight"]], lr=5e-2)
    errors = []
    for _ in range(40):
        optimiser.zero_grad()
        error = (form.attend(form.spec(at), params, q, k, v) - want).square().mean()
        error.backward()
        optimiser.step()
        errors.append(error.item())
    assert errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize("config", [{"features": -1}, {"seed": "a"}])
def test_bad_options(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(config))):
        form_named("dijiang", config)
