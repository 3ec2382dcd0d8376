"""hedgehog: its feature map, its parameters and what a fit gives."""

from __future__ import annotations

import torch

from passes.form import form_named
from tests.by_hand import site


def test_parameters_start_as_identities() -> None:
    params = form_named("hedgehog", {"feature_dim": 5}).init_params(site(H=6, G=2, D=5))
    assert {n: tuple(p.shape) for n, p in params.items()} == {"w_q": (6, 5, 5), "w_k": (2, 5, 5)}
    for p in params.values():
        assert (p == torch.eye(5)).all()
    params["w_q"][0, 0, 0] = 7.0  # heads do not share memory
    assert params["w_q"][1, 0, 0] == 1.0


def test_wider_maps_start_as_an_identity_and_rotations() -> None:
    wide = form_named("hedgehog").init_params(site(H=2, G=1, D=24))
    assert {n: tuple(p.shape) for n, p in wide.items()} == {"w_q": (2, 24, 64), "w_k": (1, 24, 64)}
    start = wide["w_q"][0]
    assert (start[:, :24] == torch.eye(24)).all()
    torch.testing.assert_close(start[:, 24:48].T @ start[:, 24:48], torch.eye(24))
    assert torch.equal(start, wide["w_q"][1])
    assert form_named("hedgehog").init_params(site(D=80))["w_q"].shape[-1] == 80


def test_the_formula_per_head_and_group() -> None:
    form, at = form_named("hedgehog"), site(B=1, H=4, G=2, T=3, S=5, D=6, E=2, scale=0.3)
    q, k = torch.randn(1, 4, 3, 6).double(), torch.randn(1, 2, 5, 6).double()
    v = torch.randn(1, 2, 5, 2).double()
    params = {n: torch.randn(p.shape).double() for n, p in form.init_params(at).items()}
    got = form.attend(form.spec(at), params, q, k, v)

    def phi(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = (0.3**0.5 * x) @ w
        return torch.cat([y.exp() / y.exp().sum(), (-y).exp() / (-y).exp().sum()])

    for h in range(4):
        for i in range(3):
            row = phi(q[0, h, i], params["w_q"][h])
            weights = torch.stack([row @ phi(x, params["w_k"][h // 2]) for x in k[0, h // 2]])
            torch.testing.assert_close(got[0, h, i], weights @ v[0, h // 2] / weights.sum())


def test_weights_can_be_fitted_to_a_peaked_softmax() -> None:
    """Unfitted it averages; fitted on one batch it follows softmax on another."""
    torch.manual_seed(7)
    form, at = form_named("hedgehog"), site(B=4, H=2, T=24, D=8)
    exact = form_named("exact")
    params = {n: torch.nn.Parameter(p) for n, p in form.init_params(at).items()}
    optimiser = torch.optim.Adam(params.values(), lr=2e-2)

    def loss(seed: int) -> torch.Tensor:
        made = torch.Generator().manual_seed(seed)
        q, k = (1.3 * torch.randn(4, 2, 24, 8, generator=made) for _ in range(2))
        teacher = exact.weights(exact.spec(at), {}, q, k)
        mine = form.weights(form.spec(at), params, q, k)
        return (
            (teacher * (teacher.clamp_min(1e-12).log() - mine.clamp_min(1e-12).log()))
            .sum(-1)
            .mean()
        )

    before = loss(1000).item()
    for step in range(80):
        optimiser.zero_grad()
        loss(step).backward()
        optimiser.step()
    assert loss(1000).item() < 0.85 * before


def test_large_inputs_stay_finite() -> None:
    form, at = form_named("hedgehog"), site(B=1, H=2, T=9, D=8)
    q, k, v = (1e4 * torch.randn(1, 2, 9, 8) for _ in range(3))
    q.requires_grad_()
    out = form.attend(form.spec(at), form.init_params(at), q, k, v)
    out.sum().backward()
    assert out.isfinite().all()
    assert q.grad is not None
    assert q.grad.isfinite().all()
