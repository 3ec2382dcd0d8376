"""shiftadd with product="quadratic": common bits to weights, the convolution, fit and kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from passes.errors import UsageError
from passes.form import form_named
from passes.forms.shiftadd import TAPS, ShiftAdd
from tests.by_hand import site
from tests.forms.test_hamming_table import likelihood, samples
from tests.targets.kit_tools import Case, Trial, trial, with_target

OPTIONS = {"product": "quadratic"}


def made(case: Case, **options: Any) -> Trial:
    """A trial with any table and convolution, away from thresholds."""
    rng, form = np.random.default_rng(), form_named("shiftadd", {**OPTIONS, **options})
    while True:
        arrays = trial("exact", case, rng).arrays
        params = {n: p.numpy() for n, p in form.init_params(case.site).items()}
        for name in ("table", "conv"):
            params[name] = rng.normal(size=params[name].shape).astype("float32")
        wide = {n: torch.from_numpy(p).double() for n, p in params.items()}
        t = Trial(form, case, arrays, params)
        q, k = (torch.from_numpy(arrays[n]).double() for n in "qk")
        if form.margin(t.spec, wide, q, k) > 1e-5:
            return t


@pytest.mark.parametrize("quantiser", ["hash", "sign"])
@pytest.mark.parametrize("padded", [False, True])
def test_weights_by_common_bits_and_nine_taps(quantiser: str, padded: bool) -> None:
    at = site(T=12, H=4, G=2, padding=padded)
    form = ShiftAdd({**OPTIONS, "quantiser": quantiser})
    params = {n: p.double() for n, p in form.init_params(at).items()}
    params["conv"], params["table"] = (torch.randn_like(params[n]) for n in ("conv", "table"))
    q, k, v = (torch.randn(2, h, 12, 8).double() for h in (4, 2, 2))
    mask = torch.ones(2, 12, dtype=torch.bool)
    if padded:
        mask[0, 9:], mask[1, :3] = False, False
    got = form.attend(form.spec(at), params, q, k, v, mask if padded else None)
    cq, ck = form.codes(q, params), form.codes(k, params)
    assert set(cq.unique().tolist()) <= {0.0, 1.0}
    for b in range(2):
        for h in range(4):
            g = h // 2
            for i in range(12):
                top, bottom = torch.zeros(8).double(), 0.0
                for j in range(12):
                    common = int(((cq[b, h, i] > 0) & (ck[b, g, j] > 0)).sum())
                    weight = float(params["table"][h, common].exp()) * bool(mask[b, j])
                    top, bottom = top + weight * v[b, g, j], bottom + weight
                near = torch.zeros(8).double()
                for t in range(TAPS):
                    j = i + t - TAPS // 2
                    if 0 <= j < 12 and mask[b, j]:
                        near = near + params["conv"][g, t] * v[b, g, j]
                torch.testing.assert_close(got[b, h, i], top / bottom + near)


@pytest.mark.parametrize("quantiser", ["hash", "sign"])
def test_the_table_is_fitted_after_the_codes(quantiser: str) -> None:
    at = site(B=2, H=4, G=2, T=24, S=24)
    form = ShiftAdd({**OPTIONS, "quantiser": quantiser, "bits": 8, "anchors": 9})
    data, fresh = samples(at), form.init_params(at)
    found = form.learn(at, fresh, data)
    best = likelihood(form, at, {**fresh, **found}, data)  # type: ignore[arg-type]
    start = {**fresh, **found, "table": fresh["table"]}
    assert best < likelihood(form, at, start, data)  # type: ignore[arg-type]
    warm = form.learn(at, {**fresh, **found}, data, warm=True)
    assert all(torch.equal(warm[n], found[n]) for n in found if n != "table")


def test_gradients_reach_queries_keys_table_and_convolution() -> None:
    at = site(T=7)
    form = ShiftAdd(OPTIONS)
    params = {n: p.double() for n, p in form.init_params(at).items()}
    leaves: list[Tensor] = [torch.randn(2, 4, 7, 8).double().requires_grad_() for _ in range(3)]
    for name in ("table", "conv"):
        params[name].requires_grad_()
    form.attend(form.spec(at), params, *leaves).square().sum().backward()
    for x in (*leaves, params["table"], params["conv"]):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() > 0
    assert form.free == {"conv", "table"}


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(T=150, S=150, D=24, E=40), {}),
        (Case(B=2, T=21, S=21, H=6, G=2, key_rows=2), {"bits": 40}),
        (Case(T=37, S=37, D=20, key_rows=1), {"quantiser": "sign"}),
        (Case(T=24, S=24, dtype="float16"), {"bits": 32}),
    ],
    ids=str,
)
def test_kernels_equal_the_module_and_are_counted(case: Case, options: dict[str, Any]) -> None:
    t = made(case, **options)
    tolerance = 2e-2 if case.dtype == "float16" else 5e-5
    built, want = t.build(), t.reference()
    np.testing.assert_allclose(t.run(built), want, atol=tolerance, rtol=tolerance)
    assert dict(built.ops.ops) == dict(t.form.ops(case.site).ops)
    narrow = with_target(t, vector_bytes=16, features=())
    np.testing.assert_allclose(narrow.run(), want, atol=tolerance, rtol=tolerance)


def test_an_unknown_product_is_refused() -> None:
    with pytest.raises(UsageError, match="linear or quadratic"):
        ShiftAdd({"product": "cubic"})
