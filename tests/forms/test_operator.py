"""galerkin and fourier: the associative order equals the quadratic form, causal and masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from passes.form import Form, form_named
from passes.substitute import AttentionModule
from rewriter.capture import Call
from rewriter.fit_loss import divergence
from tests.by_hand import site


def made(name: str, **facts: Any) -> tuple[Form, Any, dict[str, Tensor]]:
    form, at = form_named(name), site(**facts)
    params = {n: p.double() for n, p in form.init_params(at).items()}
    for p in params.values():
        p += 0.3 * torch.randn_like(p)
    return form, at, params


def quadratic(name: str, params: dict[str, Tensor], scale: float, q: Tensor, k: Tensor, v: Tensor,
              seen: Tensor) -> Tensor:  # fmt: skip
    """[B, H, T, E] by a loop over heads; `seen` [B, T, S]."""
    out = torch.zeros(*q.shape[:3], v.shape[3]).double()
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        data = {"q": q[:, h], "k": k[:, g], "v": v[:, g]}
        for n in "kv" if name == "galerkin" else "qk":
            head = h if n == "q" else g
            weight = params[f"gamma_{n}"][head], params[f"beta_{n}"][head]
            data[n] = F.layer_norm(data[n], weight[0].shape, *weight)
        scores = data["q"] @ data["k"].transpose(-1, -2) * seen
        scores = scores if name == "galerkin" else scores * scale
        out[:, h] = scores @ data["v"] / seen.sum(-1, keepdim=True).clamp_min(1)
    return out


@pytest.mark.parametrize("name", ["galerkin", "fourier"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (5, 31), (9, 4)])
def test_linear_order_equals_the_quadratic_form(
    name: str, causal: bool, queries: int, keys: int
) -> None:
    facts: dict[str, Any] = {"B": 2, "H": 4, "G": 2, "T": queries, "S": keys, "D": 6, "E": 3}
    form, at, params = made(name, **facts, causal=causal, padding=True, scale=0.7)
    q, k = torch.randn(2, 4, queries, 6).double(), torch.randn(2, 2, keys, 6).double()
    v = torch.randn(2, 2, keys, 3).double()
    key_mask = torch.rand(2, keys) > 0.4
    seen = key_mask[:, None].expand(2, queries, keys)
    seen = seen.tril(keys - queries) if causal else seen
    got = form.attend(form.spec(at), params, q, k, v, key_mask)
    want = quadratic(name, params, 0.7, q, k, v, seen.double())
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    if name == "fourier":
        weights = form.weights(form.spec(at), params, q, k, key_mask)
        torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), got)


@pytest.mark.parametrize("name", ["galerkin", "fourier"])
def test_the_mean_does_not_grow_with_the_number_of_keys(name: str) -> None:
    form, at, params = made(name, B=1, H=1, T=4, S=10, D=6)
    q, k, v = (torch.randn(1, 1, n, 6).double() for n in (4, 10, 10))
    once = form.attend(form.spec(at), params, q, k, v)
    thrice = form.attend(form.spec(at), params, q, k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1))
    torch.testing.assert_close(once, thrice, rtol=1e-10, atol=1e-10)


def test_galerkin_projects_onto_the_span_of_orthonormal_functions() -> None:
    """k = v orthonormal under the mean over tokens: q = coordinates gives the projection."""
    tokens, width = 64, 4
    x = (torch.arange(tokens).double() + 0.5) / tokens
    basis = torch.stack([torch.cos(torch.pi * n * x) * 2**0.5 for n in range(1, width + 1)], 1)
    form, at = form_named("galerkin"), site(B=1, H=1, T=tokens, D=width)
    # Layer norm across channels changes the functions; undo it by hand on a normed basis.
    params = {n: p.double() for n, p in form.init_params(at).items()}
    k = F.layer_norm(basis, (width,))
    got = form.attend(
        form.spec(at), params, basis[None, None], basis[None, None], basis[None, None]
    )
    want = basis @ (k.T @ k) / tokens
    torch.testing.assert_close(got[0, 0], want, rtol=1e-4, atol=1e-4)


def test_an_operator_is_learned() -> None:
    """Antiderivatives of random waves: a few steps of training lower the error by half."""
    made_by = torch.Generator().manual_seed(4)
    tokens, width = 32, 8
    x = torch.linspace(0, 1, tokens)
    form, at = form_named("galerkin"), site(B=16, H=1, T=tokens, D=width)
    lift = torch.nn.ParameterList(
        [torch.nn.Parameter(0.5 * torch.randn(2, width, generator=made_by)) for _ in range(3)]
    )
    out = torch.nn.Parameter(0.3 * torch.randn(width, 1, generator=made_by))
    params = {n: torch.nn.Parameter(p) for n, p in form.init_params(at).items()}
    optimiser = torch.optim.Adam([*lift, out, *params.values()], lr=2e-2)
    errors = []
    for _ in range(60):
        a, f = torch.randn(2, 16, 1, generator=made_by)
        wave = a * torch.sin(2 * f * x)
        target = a * (1 - torch.cos(2 * f * x)) / (2 * f)
        seen = torch.stack([wave, x.expand(16, -1)], -1)
        q, k, v = ((seen @ w)[:, None] for w in lift)
        made_out = (form.attend(form.spec(at), params, q, k, v)[:, 0] @ out)[..., 0]
        error = (made_out - target).square().mean() / target.square().mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        errors.append(error.item())
    assert sum(errors[-10:]) < 0.5 * sum(errors[:10])


def test_larger_weights_are_no_gain_for_a_fit() -> None:
    """The fit compares rows by their shares; signed rows do not sum to one by themselves."""
    at = site(B=1, H=2, T=9, D=6)
    attention = AttentionModule(at, form_named("fourier"))
    q, k, v = (torch.randn(1, 2, 9, 6) for _ in range(3))
    call = Call(q, k, v, None, None, v)
    before = float(divergence(attention, call))
    assert before > 0
    with torch.no_grad():
        for name in ("gamma_q", "gamma_k"):
            attention.params[name] *= 10.0
    assert abs(float(divergence(attention, call)) - before) < 1e-3 * before
