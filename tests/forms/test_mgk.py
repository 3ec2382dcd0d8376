"""mgk: one Gaussian is softmax or Gaussian attention, several add up, half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from passes.errors import UsageError
from passes.form import form_named
from tests.by_hand import site
from tests.targets.kit_tools import Case, Trial, trial


def inputs() -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 4, 9, 6).double()
    return q, torch.randn(2, 2, 11, 6).double(), torch.randn(2, 2, 11, 5).double()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("key_norm", "same"), [(True, "exact"), (False, "gaussian")])
def test_one_gaussian_is_softmax_or_gaussian_attention(
    key_norm: bool, same: str, causal: bool
) -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=9, S=11, D=6, E=5, causal=causal, padding=True)
    mask = torch.rand(2, 11) > 0.3
    form, other = form_named("mgk", {"gaussians": 1, "key_norm": key_norm}), form_named(same)
    params = {n: p.double() for n, p in form.init_params(at).items()}
    got = form.attend(form.spec(at), params, q, k, v, mask)
    want = other.attend(other.spec(at), {}, q, k, v, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_one_gaussian_without_the_factor_is_softmax_for_keys_of_one_length() -> None:
    q, k, v = inputs()
    k = k / k.norm(dim=-1, keepdim=True)
    at = site(H=4, G=2, T=9, S=11, D=6, E=5)
    form, exact = form_named("mgk", {"gaussians": 1, "key_norm": False}), form_named("exact")
    params = {n: p.double() for n, p in form.init_params(at).items()}
    got = form.attend(form.spec(at), params, q, k, v)
    want = exact.attend(exact.spec(at), {}, q, k, v)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("key_norm", [True, False])
def test_formula(key_norm: bool) -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=9, S=11, D=6, E=5, bias=True)
    form = form_named("mgk", {"gaussians": 3, "key_norm": key_norm})
    params = {n: torch.randn_like(p).double() for n, p in form.init_params(at).items()}
    bias = torch.randn(1, 4, 9, 11).double()
    total = torch.zeros(2, 4, 9, 11).double()
    for r in range(3):
        shift, rate, mix = (
            params[n][:, r].repeat_interleave(2, 0) for n in ("shift", "rate", "mix")
        )
        wide = k.repeat_interleave(2, 1)
        gap = torch.cdist(q, wide + shift[:, None]) ** 2
        if key_norm:
            gap = gap - wide.square().sum(-1)[:, :, None]
        scaled = -0.5 * at.scale * rate.exp()[:, None, None] * gap
        total += (scaled + mix[:, None, None] + bias).exp()
    want = total / total.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)
    got = form.attend(form.spec(at), params, q, k, v, None, bias)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_a_shift_of_the_mixture_cancels_and_an_empty_part_does_not_count() -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=9, S=11, D=6, E=5)
    form, one = form_named("mgk"), form_named("mgk", {"gaussians": 1})
    params = {n: p.double() + 0.3 for n, p in form.init_params(at).items()}
    base = form.attend(form.spec(at), params, q, k, v)
    moved = {**params, "mix": params["mix"] + 2.5}
    torch.testing.assert_close(
        form.attend(form.spec(at), moved, q, k, v), base, rtol=0, atol=1e-12
    )  # fmt: skip
    params["mix"][:, 1] = -500.0
    first = {n: p[:, :1] for n, p in params.items()}
    want = one.attend(one.spec(at), first, q, k, v)
    got = form.attend(form.spec(at), params, q, k, v)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_kernel_in_half_precision() -> None:
    case = Case(B=2, H=4, G=2, T=9, S=21, D=12, E=20, dtype="float16")
    plain = trial("mgk", case, np.random.default_rng())
    half = {n: p.astype("float16") for n, p in plain.params.items()}
    t = Trial(plain.form, case, plain.arrays, half)
    np.testing.assert_allclose(t.run(), t.reference(), atol=4e-3, rtol=0)


@pytest.mark.parametrize("config", [{"gaussians": 0}, {"gaussians": 17}, {"key_norm": 1}])
def test_bad_options(config: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(config))):
        form_named("mgk", config)
