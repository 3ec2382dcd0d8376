"""linformer: identity maps give softmax; means of runs; masks; learning; its kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from passes.errors import FormError, LoweringError, UsageError
from passes.form import Reason, form_named
from tests.by_hand import site
from tests.targets.kit_tools import Case, Trial, trial


def inputs(queries: int = 9, keys: int = 12) -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 4, queries, 6).double()
    return q, torch.randn(2, 2, keys, 6).double(), torch.randn(2, 2, keys, 5).double()


@pytest.mark.parametrize("padding", [False, True])
def test_identity_maps_give_softmax(padding: bool) -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=9, S=12, D=6, E=5, padding=padding)
    mask = torch.rand(2, 12) > 0.3 if padding else None
    form, exact = form_named("linformer", {"rank": 12}), form_named("exact")
    params = {n: p.double() for n, p in form.init_params(at).items()}
    assert torch.equal(params["e"], torch.eye(12).double().expand(2, -1, -1))
    got = form.attend(form.spec(at), params, q, k, v, mask)
    want = exact.attend(exact.spec(at), {}, q, k, v, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_equal_neighbours_give_softmax_from_the_start() -> None:
    """Four runs of uneven length, all keys of a run alike: the log of the length is exact."""
    form, exact = form_named("linformer", {"rank": 4}), form_named("exact")
    at = site(H=4, G=2, T=9, S=14, D=6, E=5, padding=True)
    params = {n: p.double() for n, p in form.init_params(at).items()}
    run = (params["e"][0] > 0).double().argmax(0)
    q, k, v = inputs(9, 4)
    k = k[:, :, run]
    v = v[:, :, run] + 0.0
    mask = torch.rand(2, 14) > 0.4
    for hidden in (None, mask):
        got = form.attend(form.spec(at), params, q, k, v, hidden)
        want = exact.attend(exact.spec(at), {}, q, k, v, hidden)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # params are float32


def test_error_falls_with_the_rank() -> None:
    steps = torch.randn(1, 2, 64, 6).double().cumsum(2)
    q, k, v = (steps / 5 + 0.1 * torch.randn(1, 2, 64, 6).double() for _ in range(3))
    at = site(B=1, H=2, T=64, S=64, D=6)
    exact = form_named("exact")
    want = exact.attend(exact.spec(at), {}, q, k, v)
    errors = []
    for rank in (2, 8, 32, 64):
        form = form_named("linformer", {"rank": rank})
        params = {n: p.double() for n, p in form.init_params(at).items()}
        errors.append(float((form.attend(form.spec(at), params, q, k, v) - want).norm()))
    assert errors[0] > errors[1] > errors[2] > errors[3]


def test_weights_are_those_of_the_output() -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=9, S=12, D=6, E=5, padding=True)
    form = form_named("linformer", {"rank": 5})
    params = {n: torch.randn_like(p).double() for n, p in form.init_params(at).items()}
    mask = torch.rand(2, 12) > 0.3
    weights = form.weights(form.spec(at), params, q, k, mask)
    out = form.attend(form.spec(at), params, q, k, v, mask)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out, rtol=0, atol=1e-12)
    assert (weights * ~mask[:, None, None] == 0).all()


def test_a_slot_without_a_visible_key_does_not_count() -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=9, S=12, D=6, E=5, padding=True)
    form = form_named("linformer", {"rank": 3})
    params = {n: p.double() for n, p in form.init_params(at).items()}
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 4:8] = False  # the whole second run
    got = form.attend(form.spec(at), params, q, k, v, mask)
    two = {n: p[:, [0, 2]] for n, p in params.items()}
    want = form.attend(form.spec(at), two, q, k, v, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, H=4, G=2, T=21, S=45, D=16, E=20, key_rows=2),
        Case(T=20, S=67, D=40, E=8),
        Case(T=20, S=21, D=8, E=8, key_rows=1, dtype="float16"),
    ],
    ids=str,
)
def test_kernels(case: Case) -> None:
    form = form_named("linformer", {"rank": 9})
    arrays = trial("exact", case, np.random.default_rng()).arrays
    params = {n: p.numpy().astype(case.dtype) for n, p in form.init_params(case.site).items()}
    t = Trial(form, case, arrays, params)
    if case.key_rows == 2:
        t.arrays["key_mask"][1, :14] = False  # empties a slot or two
    built = t.build()
    wide = case.dtype == "float32"
    np.testing.assert_allclose(t.run(built), t.reference(), atol=2e-5 if wide else 4e-3, rtol=0)
    if wide:
        assert dict(built.ops.ops) == dict(form.ops(case.site).ops)


def test_refusals_and_errors() -> None:
    form = form_named("linformer")
    assert form.applies(site(causal=True)).reason is Reason.MASK_CAUSAL
    assert form.applies(site(bias=True)).reason is Reason.MASK_BIAS
    plain = site()
    dynamic = replace(plain, dims=replace(plain.dims, S="tokens"))
    verdict = form.applies(dynamic)
    assert verdict.reason is Reason.LENGTH
    assert "dynamic shapes" in verdict.detail
    q, k, v = inputs()
    params = form.init_params(site(H=4, G=2, T=9, S=8, D=6, E=5))
    with pytest.raises(FormError, match="up to 8 keys, and there are 12"):
        form.attend(form.spec(plain), params, q, k, v)
    t = trial("linformer", Case(T=5, S=9, D=8, E=8), np.random.default_rng())
    t.arrays["k"] = t.arrays["k"][:, :, :7]
    t.arrays["v"] = t.arrays["v"][:, :, :7]
    with pytest.raises(LoweringError, match="for 9 tokens, and there are 7"):
        t.build()
    with pytest.raises(UsageError, match="rank"):
        form_named("linformer", {"rank": -1})
