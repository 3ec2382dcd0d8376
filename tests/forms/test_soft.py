"""soft: all keys as landmarks give softmax; Newton's inverse; masks; its kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from passes.errors import UsageError
from passes.form import FormSpec, Reason, form_named
from passes.forms._landmarks import filled, segment_means
from passes.forms.soft import SoftConfig, _inverse, low_rank
from tests.by_hand import site
from tests.targets.kit_tools import Case, Trial, trial

PLAIN = FormSpec("exact", False, 0.4)


def inputs(queries: int = 12, keys: int = 12) -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 4, queries, 6).double()
    return q, torch.randn(2, 2, keys, 6).double(), torch.randn(2, 2, keys, 5).double()


@pytest.mark.parametrize("padding", [False, True])
def test_all_keys_as_landmarks_give_softmax(padding: bool) -> None:
    q, k, v = inputs(9, 12)
    k = 2 * k  # apart, so the system is far from singular
    mask = torch.rand(2, 12) > 0.3 if padding else None
    want = form_named("exact").attend(PLAIN, {}, q, k, v, mask)
    errors = []
    for ridge in (1e-2, 1e-4, 1e-6):
        got = low_rank(PLAIN, SoftConfig(12, ridge, 40), q, k, v, mask)
        errors.append(float((got - want).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_the_key_norm_makes_it_softmax_and_not_a_gaussian() -> None:
    q, k, v = inputs()
    k = 2 * k
    got = low_rank(PLAIN, SoftConfig(12, 1e-6, 40), q, k, v)
    exact, gaussian = (form_named(n).attend(PLAIN, {}, q, k, v) for n in ("exact", "gaussian"))
    assert (got - exact).norm() < 0.01 * (got - gaussian).norm()


@pytest.mark.parametrize("hidden", [0, 3])
def test_newton_finds_the_inverse(hidden: int) -> None:
    marks = torch.randn(1, 2, 10, 4).double()
    seen = None if not hidden else torch.arange(10)[None] < 10 - hidden
    got = _inverse(PLAIN, SoftConfig(10, 0.01, 25), marks, seen)
    matrix = (-0.5 * PLAIN.scale * torch.cdist(marks, marks) ** 2).exp()
    matrix = matrix + 0.01 * torch.eye(10).double()
    some = 10 - hidden
    want = torch.linalg.inv(matrix[..., :some, :some])
    torch.testing.assert_close(got[..., :some, :some], want, rtol=0, atol=1e-8)
    assert (got[..., :some, some:] == 0).all()
    few = _inverse(PLAIN, SoftConfig(10, 0.01, 4), marks, seen)
    assert (few[..., :some, :some] - want).norm() > (got[..., :some, :some] - want).norm()


def test_error_falls_with_landmarks_where_neighbours_are_alike() -> None:
    steps = torch.randn(1, 2, 96, 8).double().cumsum(2)
    q, k = (steps / 6 + 0.1 * torch.randn(1, 2, 96, 8).double() for _ in range(2))
    v = steps[..., :4] + torch.randn(1, 2, 96, 4).double()
    want = form_named("exact").attend(PLAIN, {}, q, k, v)
    errors = [
        float((low_rank(PLAIN, SoftConfig(m, 1e-3, 30), q, k, v) - want).norm() / want.norm())
        for m in (2, 24, 96)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_hidden_keys_could_as_well_be_absent_and_none_gives_zero() -> None:
    q, k, v = inputs(30, 41)
    mask, options = torch.rand(1, 41) > 0.4, SoftConfig(8, 0.01, 20)
    got = low_rank(PLAIN, options, q, k, v, mask)
    want = low_rank(PLAIN, options, q, k[:, :, mask[0]], v[:, :, mask[0]])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    nothing = low_rank(PLAIN, options, q, k, v, torch.zeros_like(mask))
    assert (nothing == 0).all()
    marks = filled(8, mask)
    assert marks is not None
    assert segment_means(k, 8, mask)[:, :, marks[0]].abs().sum(-1).min() > 0


def test_weights_are_those_of_the_output_and_gradients_are_finite() -> None:
    form, at = form_named("soft", {"landmarks": 5}), site(H=4, G=2, T=12, S=20, D=6, E=5)
    q, k, v = inputs(12, 20)
    mask = torch.rand(2, 20) > 0.4
    weights = form.weights(form.spec(at), {}, q, k, mask)
    out = form.attend(form.spec(at), {}, q, k, v, mask)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out, rtol=0, atol=1e-11)
    q.requires_grad_()
    k.requires_grad_()
    form.attend(form.spec(at), {}, q, k, v, mask).square().sum().backward()
    for x in (q, k):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() > 0


@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, H=4, G=2, T=40, S=45, D=16, E=20, key_rows=2),
        Case(T=20, S=21, D=8, E=8, dtype="float16"),
    ],
    ids=str,
)
def test_kernels_of_many_tokens(case: Case) -> None:
    form = form_named("soft", {"landmarks": 11, "ridge": 0.1})
    t = Trial(form, case, trial("exact", case, np.random.default_rng()).arrays, {})
    if case.key_rows:
        t.arrays["key_mask"][1, 6:] = False  # fewer visible than landmarks
    built = t.build()
    wide, want = case.dtype == "float32", t.reference()
    worst = (1e-4 if wide else 1e-2) * max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(t.run(built), want, atol=worst, rtol=0)
    if wide:
        assert dict(built.ops.ops) == dict(form.ops(case.site).ops)


def test_which_masks_and_options_it_takes() -> None:
    form = form_named("soft")
    assert form.applies(site(padding=True, H=4, G=2))
    assert form.applies(site(causal=True)).reason is Reason.MASK_CAUSAL
    assert form.applies(site(bias=True)).reason is Reason.MASK_BIAS
    for config in ({"landmarks": 0}, {"steps": 51}, {"ridge": 0.0}):
        with pytest.raises(UsageError, match=next(iter(config))):
            form_named("soft", config)
