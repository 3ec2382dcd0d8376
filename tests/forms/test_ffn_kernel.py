"""ffn_kernel: its network, where it starts, and that the gate is worth training."""

from __future__ import annotations

import pytest
import torch

from passes.errors import UsageError
from passes.form import form_named
from tests.by_hand import site


def test_the_formula_per_head_and_group() -> None:
    form = form_named("ffn_kernel", {"hidden": 5, "features": 7})
    at = site(B=1, H=4, G=2, T=3, S=5, D=6, E=2, scale=0.3)
    q, k = torch.randn(1, 4, 3, 6).double(), torch.randn(1, 2, 5, 6).double()
    v = torch.randn(1, 2, 5, 2).double()
    params = {n: torch.randn(p.shape).double() for n, p in form.init_params(at).items()}
    assert params["in_q"].shape == (4, 6, 5)
    assert params["out_k"].shape == (2, 5, 7)
    got = form.attend(form.spec(at), params, q, k, v)

    def phi(x: torch.Tensor, name: str, head: int) -> torch.Tensor:
        x = 0.3**0.5 * x
        gate = 1 / (1 + (-(x @ params[f"gate_{name}"][head])).exp())
        y = (x @ params[f"in_{name}"][head] * gate) @ params[f"out_{name}"][head]
        return torch.where(y > 0, y + 1, y.exp())

    for h in range(4):
        weights = phi(q[0, h], "q", h) @ phi(k[0, h // 2], "k", h // 2).T
        want = weights / weights.sum(-1, keepdim=True) @ v[0, h // 2]
        torch.testing.assert_close(got[0, h], want, rtol=1e-9, atol=1e-9)


def test_it_starts_as_elu_of_the_scaled_query_and_key() -> None:
    form, elu, at = form_named("ffn_kernel"), form_named("elu"), site(B=1, H=2, T=6, D=9)
    q, k, v = (torch.randn(1, 2, 6, 9).double() for _ in range(3))
    params = {n: p.double() for n, p in form.init_params(at).items()}
    got = form.attend(form.spec(at), params, q, k, v)
    root = at.scale**0.5
    torch.testing.assert_close(got, elu.attend(elu.spec(at), {}, root * q, root * k, v))


def test_wider_and_narrower_maps_are_orthonormal() -> None:
    for hidden, features in ((4, 12), (12, 4)):
        form = form_named("ffn_kernel", {"hidden": hidden, "features": features})
        params = form.init_params(site(D=8))
        w, out = params["in_q"][0], params["out_q"][0] / 2
        for m in (w, out):
            gram = m.T @ m if m.shape[0] >= m.shape[1] else m @ m.T
            torch.testing.assert_close(gram, torch.eye(gram.shape[0]), rtol=0, atol=1e-5)


def test_training_the_gate_alone_helps() -> None:
    form, exact, at = form_named("ffn_kernel"), form_named("exact"), site(B=2, H=2, T=24, D=8)
    made = torch.Generator().manual_seed(6)
    q, k, v = (1.5 * torch.randn(2, 2, 24, 8, generator=made) for _ in range(3))
    want = exact.attend(exact.spec(at), {}, q, k, v)
    params = dict(form.init_params(at))
    gates = [params[f"gate_{n}"].requires_grad_() for n in "qk"]
    optimiser = torch.optim.Adam(gates, lr=3e-2)
    errors = []
    for _ in range(60):
        optimiser.zero_grad()
        error = (form.attend(form.spec(at), params, q, k, v) - want).square().mean()
        error.backward()
        optimiser.step()
        errors.append(error.item())
    assert errors[-1] < 0.9 * errors[0]


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="hidden"):
        form_named("ffn_kernel", {"hidden": -1})
    with pytest.raises(UsageError, match="features"):
        form_named("ffn_kernel", {"features": 0.5})
