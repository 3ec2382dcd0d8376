"""nystrom: all tokens as landmarks give softmax; runs, masks, the inverse; its kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from passes.errors import UsageError
from passes.form import FormSpec, Reason, form_named
from passes.forms._landmarks import filled, segment_means, share_of
from passes.forms.nystrom import NystromConfig, low_rank, pseudo_inverse
from tests.by_hand import site
from tests.targets.kit_tools import Case, Trial, trial

PLAIN = FormSpec("exact", False, 0.4)


def inputs(queries: int = 12, keys: int = 12) -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 4, queries, 6).double()
    return q, torch.randn(2, 2, keys, 6).double(), torch.randn(2, 2, keys, 5).double()


def test_all_tokens_as_landmarks_give_softmax() -> None:
    q, k, v = inputs()
    got = low_rank(PLAIN, NystromConfig(12, 60), q, k, v)
    want = form_named("exact").attend(PLAIN, {}, q, k, v)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 9:], mask[1, :2] = False, False
    got = low_rank(PLAIN, NystromConfig(12, 60), q, k, v, mask)
    middle = form_named("exact").weights(PLAIN, {}, q, k, mask)
    # With fewer keys than queries the middle is not square: A A^+ A = A all the same.
    torch.testing.assert_close(
        got, middle @ v.repeat_interleave(2, 1), rtol=0, atol=1e-8
    )  # fmt: skip


def test_few_tokens_take_exact_attention() -> None:
    form, exact = form_named("nystrom", {"landmarks": 12}), form_named("exact")
    for queries, keys in ((12, 40), (40, 12)):
        q, k, v = inputs(queries, keys)
        at = site(H=4, G=2, T=queries, S=keys, D=6, E=5)
        got = form.attend(form.spec(at), {}, q, k, v)
        torch.testing.assert_close(got, exact.attend(exact.spec(at), {}, q, k, v))
        assert form.ops(at) == exact.ops(at)


def test_error_falls_with_landmarks_where_neighbours_are_alike() -> None:
    steps = torch.randn(1, 2, 96, 8).double().cumsum(2)
    q, k = (steps / 6 + 0.1 * torch.randn(1, 2, 96, 8).double() for _ in range(2))
    v = torch.randn(1, 2, 96, 4).double()
    want = form_named("exact").attend(PLAIN, {}, q, k, v)
    errors = [
        float((low_rank(PLAIN, NystromConfig(m, 20), q, k, v) - want).norm() / want.norm())
        for m in (2, 24, 96)
    ]
    assert errors[2] < 1e-3
    assert errors[1] < 0.5 * errors[0]


def test_the_inverse_is_moore_penrose() -> None:
    a = torch.randn(3, 10, 10).double().softmax(-1)
    a[0, :, 7:] = 0
    a[0] /= a[0].sum(-1, keepdim=True)
    z = pseudo_inverse(a, 40)
    torch.testing.assert_close(z, torch.linalg.pinv(a), rtol=1e-6, atol=1e-6)
    few = pseudo_inverse(a, 6)
    assert (a @ few @ a - a).norm() < (a @ pseudo_inverse(a, 2) @ a - a).norm()
    assert (pseudo_inverse(torch.zeros(4, 4).double(), 6) == 0).all()


@pytest.mark.parametrize(("tokens", "m"), [(12, 4), (13, 4), (5, 5), (7, 20), (100, 33)])
def test_runs_are_even_in_order_and_complete(tokens: int, m: int) -> None:
    mask = torch.rand(3, tokens) > 0.3
    mask[0], mask[1] = True, False
    share = share_of(tokens, m, mask)
    sizes = (share > 0).sum(-1)
    for row, size, seen in zip(share, sizes, mask, strict=True):
        n = int(seen.sum())
        assert size.sum() == n
        assert size.max() - size[: min(m, n)].min() <= 1 if n else size.max() == 0
        assert ((row > 0).any(0) == seen).all()
        run = row[:, seen].argmax(0) if n else torch.zeros(0)
        assert (run[1:] >= run[:-1]).all()
    marks = filled(m, mask)
    assert marks is not None
    assert (marks == (sizes > 0)).all()


def test_hidden_tokens_could_as_well_be_absent() -> None:
    q, k, v = inputs(30, 41)
    mask = torch.rand(1, 41) > 0.4
    got = low_rank(PLAIN, NystromConfig(8, 6), q, k, v, mask)
    want = low_rank(PLAIN, NystromConfig(8, 6), q, k[:, :, mask[0]], v[:, :, mask[0]])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        segment_means(k, 50, mask)[:, :, : int(mask.sum())], k[:, :, mask[0]], rtol=0, atol=1e-14
    )


def test_weights_are_those_of_the_output_and_nothing_seen_gives_zero() -> None:
    form, at = form_named("nystrom", {"landmarks": 5}), site(H=4, G=2, T=12, S=20, D=6, E=5)
    q, k, v = inputs(12, 20)
    mask = torch.rand(2, 20) > 0.4
    mask[1] = False
    weights = form.weights(form.spec(at), {}, q, k, mask)
    out = form.attend(form.spec(at), {}, q, k, v, mask)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out, rtol=0, atol=1e-12)
    assert (out[1] == 0).all()
    assert torch.autograd.gradcheck(
        lambda q, k: form.attend(form.spec(at), {}, q, k, v[:1, :, :], mask[:1]),
        (q[:1].requires_grad_(), k[:1].requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, H=4, G=2, T=40, S=45, D=16, E=20, key_rows=2),
        Case(H=2, G=1, T=70, S=131, D=24, E=40),
        Case(T=20, S=21, D=8, E=8, dtype="float16"),
    ],
    ids=str,
)
def test_kernels_of_many_tokens(case: Case) -> None:
    form = form_named("nystrom", {"landmarks": 11})
    t = Trial(form, case, trial("exact", case, np.random.default_rng()).arrays, {})
    if case.key_rows:
        t.arrays["key_mask"][1, 6:] = False  # fewer visible than landmarks
    built = t.build()
    wide = case.dtype == "float32"
    np.testing.assert_allclose(t.run(built), t.reference(), atol=2e-5 if wide else 4e-3, rtol=0)
    assert all(k.scheduled_by in ("attention", "landmarks") for k in built.kernels)
    if wide:
        assert dict(built.ops.ops) == dict(form.ops(case.site).ops)


def test_which_masks_it_takes() -> None:
    form = form_named("nystrom")
    assert form.applies(site(padding=True, H=4, G=2))
    for facts, reason in (
        ({"causal": True}, Reason.MASK_CAUSAL),
        ({"bias": True}, Reason.MASK_BIAS),
        ({"window": (1, 1)}, Reason.MASK_WINDOW),
    ):
        assert form.applies(site(**facts)).reason is reason


@pytest.mark.parametrize("config", [{"landmarks": 0}, {"steps": 101}, {"landmarks": 6.5}])
def test_bad_options(config: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(config))):
        form_named("nystrom", config)
