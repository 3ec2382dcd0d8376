"""cosformer: its split features equal the direct quadratic form, in causal and cross use too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from passes.errors import FormError, UsageError
from passes.form import Reason, form_named
from passes.forms.cosformer import FLOOR
from tests.by_hand import site


@pytest.mark.parametrize(
    ("queries", "keys", "causal"),
    [(70, 70, False), (5, 31, False), (130, 130, True), (9, 90, True)],
)
def test_split_equals_the_direct_form(queries: int, keys: int, causal: bool) -> None:
    span = 140
    form = form_named("cosformer", {"span": span})
    at = site(B=2, H=2, G=1, T=queries, S=keys, D=6, causal=causal)
    q, k = torch.randn(2, 2, queries, 6).double(), torch.randn(2, 1, keys, 6).double()
    v = torch.randn(2, 1, keys, 6).double()
    i = torch.arange(queries)[:, None] + (keys - queries if causal else 0)
    j = torch.arange(keys)[None]
    near = torch.cos(math.pi / 2 * (i - j).double() / span)
    weights = (q.relu() + FLOOR) @ (k.relu() + FLOOR).transpose(-1, -2) * near
    assert (near > 0).all()
    weights = weights.masked_fill(j > i, 0.0) if causal else weights
    want = weights / weights.sum(-1, keepdim=True) @ v
    got = form.attend(form.spec(at), {}, q, k, v)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_tokens_a_span_apart_do_not_meet() -> None:
    form, at = form_named("cosformer", {"span": 8}), site(B=1, H=1, T=8, S=8, D=2)
    q = k = torch.ones(1, 1, 8, 2).double()
    weights = form.weights(form.spec(at), {}, q, k)[0, 0]
    assert (weights[0].diff() < 0).all()
    assert float(weights[0, 7]) < float(weights[0, 1]) / 4


def test_earlier_features_do_not_depend_on_the_length() -> None:
    form = form_named("cosformer")
    q, k, v = (torch.randn(1, 1, 60, 4).double() for _ in range(3))
    long = form.attend(form.spec(site(causal=True, T=60)), {}, q, k, v)
    short = form.attend(
        form.spec(site(causal=True, T=20)), {}, q[:, :, :20], k[:, :, :20], v[:, :, :20]
    )
    torch.testing.assert_close(long[:, :, :20], short, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("facts", [{"T": 2000}, {"T": 5, "S": 2000}])
def test_more_tokens_than_the_span(facts: dict[str, Any]) -> None:
    verdict = form_named("cosformer").applies(site(**facts))
    assert verdict.reason is Reason.LENGTH
    assert "at least 2000" in verdict.detail
    assert form_named("cosformer", {"span": 2000}).applies(site(**facts))
    form = form_named("cosformer", {"span": 4})
    x = torch.randn(1, 1, 5, 4)
    with pytest.raises(FormError, match="span is 4"):
        form.attend(form.spec(site(T=4, D=4)), {}, x, x, x)


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="span"):
        form_named("cosformer", {"span": 0})
