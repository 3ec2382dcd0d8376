"""gaussian: its formula by distances; softmax for keys of one length; half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from passes.form import form_named
from tests.by_hand import site
from tests.targets.kit_tools import Case, Trial, trial


def inputs() -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 4, 9, 6).double()
    return q, torch.randn(2, 2, 11, 6).double(), torch.randn(2, 2, 11, 5).double()


@pytest.mark.parametrize("causal", [False, True])
def test_weights_fall_with_the_distance(causal: bool) -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=9, S=11, D=6, E=5, causal=causal)
    wide = k.repeat_interleave(2, 1)
    power = (-0.5 * at.scale * torch.cdist(q, wide) ** 2).exp()
    if causal:
        power = power.tril(2)
    want = power / power.sum(-1, keepdim=True)
    form = form_named("gaussian")
    got = form.weights(form.spec(at), {}, q, k)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    out = form.attend(form.spec(at), {}, q, k, v)
    torch.testing.assert_close(out, want @ v.repeat_interleave(2, 1), rtol=0, atol=1e-12)


def test_keys_of_one_length_give_softmax() -> None:
    q, k, v = inputs()
    k = 3.0 * k / k.norm(dim=-1, keepdim=True)
    at = site(H=4, G=2, T=9, S=11, D=6, E=5, bias=True)
    bias = torch.randn(2, 1, 9, 11).double()
    form, exact = form_named("gaussian"), form_named("exact")
    got = form.attend(form.spec(at), {}, q, k, v, None, bias)
    want = exact.attend(exact.spec(at), {}, q, k, v, None, bias)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    k[:, :, 0] *= 2
    apart = form.attend(form.spec(at), {}, q, k, v, None, bias)
    assert (apart - exact.attend(exact.spec(at), {}, q, k, v, None, bias)).abs().max() > 1e-3


def test_long_keys_in_half_precision() -> None:
    case = Case(B=2, H=4, G=2, T=9, S=21, D=64, E=20, dtype="float16")
    plain = trial("exact", case, np.random.default_rng())
    plain.arrays["k"] *= 4  # |k|^2 / 2 near 500: float16 keeps it to a half
    t = Trial(form_named("gaussian"), case, plain.arrays, {})
    np.testing.assert_allclose(t.run(), t.reference(), atol=4e-3, rtol=0)
