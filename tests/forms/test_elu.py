"""elu: the formula of the paper, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from passes.form import Reason, form_named
from tests.by_hand import site


def test_the_formula() -> None:
    form, at = form_named("elu"), site(B=1, H=1, T=3, S=4, D=2, scale=123.0)
    q, k = 3 * torch.randn(3, 2).double(), 3 * torch.randn(4, 2).double()
    v = torch.randn(4, 2).double()

    def phi(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x + 1, x.exp())

    top, bottom = torch.zeros(3, 2).double(), torch.zeros(3, 1).double()
    for i in range(3):
        for j in range(4):
            weight = phi(q[i]) @ phi(k[j])
            top[i] += weight * v[j]
            bottom[i] += weight
    got = form.attend(form.spec(at), {}, q[None, None], k[None, None], v[None, None])
    torch.testing.assert_close(got[0, 0], top / bottom)


def test_it_is_blind_to_the_size_of_large_positive_inputs() -> None:
    form, at = form_named("elu"), site(B=1, H=1, T=6, D=4)
    q, k, v = (torch.rand(1, 1, 6, 4).double() for _ in range(3))
    spec = form.spec(at)
    big = form.attend(spec, {}, 1e6 * q, k, v)
    torch.testing.assert_close(big, form.attend(spec, {}, 1e8 * q, k, v), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["elu", "hedgehog"])
@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"bias": True}, Reason.MASK_BIAS),
        ({"unknown": True}, Reason.MASK_UNKNOWN),
        ({"window": (4, 4)}, Reason.MASK_WINDOW),
        ({"H": 4, "G": 3}, Reason.GROUPED),
        ({"dtype": "int8"}, Reason.DTYPE),
    ],
)
def test_refusals(name: str, facts: dict[str, object], reason: Reason) -> None:
    verdict = form_named(name).applies(site(**facts))  # type: ignore[arg-type]
    assert not verdict
    assert verdict.reason is reason


@pytest.mark.parametrize("name", ["elu", "hedgehog"])
def test_taken(name: str) -> None:
    form = form_named(name)
    for facts in ({}, {"causal": True}, {"padding": True}, {"causal": True, "padding": True},
                  {"G": 2}, {"S": 31}, {"E": 3}):  # fmt: skip
        assert form.applies(site(**facts))  # type: ignore[arg-type]
