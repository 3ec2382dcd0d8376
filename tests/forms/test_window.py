"""window: wide windows are softmax, narrow ones a masked softmax, its cost, its refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from passes.errors import UsageError
from passes.form import Reason, form_named
from tests.by_hand import site


def inputs(heads: int, groups: int, queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, heads, queries, 6).double()
    return q, torch.randn(2, groups, keys, 6).double(), torch.randn(2, groups, keys, 5).double()


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_of_all_tokens_is_softmax(causal: bool) -> None:
    at, (q, k, v) = site(H=4, G=2, T=17, S=17, D=6, E=5, causal=causal), inputs(4, 2, 17, 17)
    form, exact = form_named("window", {"left": 16}), form_named("exact")
    want = exact.attend(exact.spec(at), {}, q, k, v)
    torch.testing.assert_close(form.attend(form.spec(at), {}, q, k, v), want, rtol=0, atol=1e-12)
    narrow = form_named("window", {"left": 15})
    assert (narrow.attend(narrow.spec(at), {}, q, k, v) - want).abs().max() > 1e-6


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, -1), (2, 5), (0, 4)])
def test_equals_softmax_with_a_band(left: int, right: int) -> None:
    at, (q, k, v) = site(H=2, G=2, T=19, S=19, D=6, E=5, bias=True), inputs(2, 2, 19, 19)
    bias = torch.randn(2, 1, 19, 19).double()
    form = form_named("window", {"left": left, "right": right})
    got = form.attend(form.spec(at), {}, q, k, v, None, bias)
    rows = []
    for i in range(19):
        low, high = max(i - left, 0), i + (left if right < 0 else right) + 1
        logits = (q[:, :, i : i + 1] @ k[:, :, low:high].transpose(-1, -2)) * at.scale
        logits = logits + bias[:, :, i : i + 1, low:high]
        rows.append(logits.softmax(-1) @ v[:, :, low:high])
    torch.testing.assert_close(got, torch.cat(rows, 2), rtol=0, atol=1e-12)


def test_the_sites_own_window_is_narrowed_and_never_widened() -> None:
    form = form_named("window", {"left": 4, "right": 3})
    q, k, v = inputs(2, 2, 15, 15)
    exact = form_named("exact")
    for own, both in (((2, 8), (2, 3)), ((9, 1), (4, 1))):
        at, narrow = (site(H=2, T=15, S=15, D=6, E=5, window=w) for w in (own, both))
        got = form.attend(form.spec(at), {}, q, k, v)
        want = exact.attend(exact.spec(narrow), {}, q, k, v)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_counted_pairs_are_those_inside() -> None:
    for causal, keys in ((False, 12), (True, 12), (True, 20)):
        form = form_named("window", {"left": 3, "right": 2})
        at = site(B=1, H=1, G=1, T=12, S=keys, D=4, E=4, causal=causal)
        q, k = torch.randn(1, 1, 12, 4), torch.randn(1, 1, keys, 4)
        pairs = int((form.weights(form.spec(at), {}, q, k) > 0).sum())
        assert form.counted(at).total("mul") == pairs * 9
        assert form.counted(at).total("add") == pairs * 8


def test_refuses_tokens_that_are_not_neighbours() -> None:
    form = form_named("window")
    for at in (replace(site(), cross=True), site(T=5, S=9), replace(site(), reduced=True)):
        verdict = form.applies(at)
        assert not verdict
        assert verdict.reason is Reason.CROSS
    assert form.applies(site(T=1, S=9, causal=True))


@pytest.mark.parametrize("config", [{"left": -1}, {"right": -2}, {"left": 1.5}])
def test_bad_options(config: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(config))):
        form_named("window", config)
