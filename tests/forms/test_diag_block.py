"""diag_block: equals softmax with a block diagonal mask, and refuses what has no blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from passes.errors import FormError, UsageError
from passes.form import Reason, form_named
from tests.by_hand import site


@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 29])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_equals_the_masked_dense_form(tokens: int, causal: bool, padding: bool) -> None:
    form, exact = form_named("diag_block", {"block": 8}), form_named("exact")
    facts: dict[str, Any] = {"B": 2, "H": 4, "G": 2, "T": tokens, "D": 6, "E": 3}
    at = site(**facts, causal=causal, padding=padding)
    q, k = torch.randn(2, 4, tokens, 6).double(), torch.randn(2, 2, tokens, 6).double()
    v = torch.randn(2, 2, tokens, 3).double()
    key_mask = torch.rand(2, tokens) > 0.5 if padding else None
    block = torch.arange(tokens) // 8
    got = form.attend(form.spec(at), {}, q, k, v, key_mask)
    spec = exact.spec(site(**facts, causal=causal, bias=True))
    want = exact.weights(spec, {}, q, k, key_mask, block[:, None] == block)
    torch.testing.assert_close(got, want @ v.repeat_interleave(2, 1), rtol=1e-10, atol=1e-10)


def test_one_block_is_softmax() -> None:
    form, exact, at = form_named("diag_block", {"block": 30}), form_named("exact"), site(T=21)
    q, k, v = (torch.randn(2, 4, 21, 8).double() for _ in range(3))
    got = form.attend(form.spec(at), {}, q, k, v)
    torch.testing.assert_close(got, exact.attend(exact.spec(at), {}, q, k, v))


def test_the_cost_is_linear_in_the_tokens() -> None:
    form = form_named("diag_block")
    counts = [form.ops(site(T=t, D=32)).total() for t in (64, 1024, 2048)]
    assert counts[2] == 2 * counts[1] == 32 * counts[0]


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"T": 5, "S": 7}, Reason.CROSS),
        ({"bias": True}, Reason.MASK_BIAS),
        ({"window": (4, 4)}, Reason.MASK_WINDOW),
        ({"unknown": True}, Reason.MASK_UNKNOWN),
        ({"H": 4, "G": 3}, Reason.GROUPED),
    ],
)
def test_refusals(facts: dict[str, Any], reason: Reason) -> None:
    assert form_named("diag_block").applies(site(**facts)).reason is reason


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="block"):
        form_named("diag_block", {"block": 0})
    form, at = form_named("diag_block"), site(T=4)
    with pytest.raises(FormError, match="4 queries and 6 keys"):
        form.attend(form.spec(at), {}, torch.randn(2, 4, 4, 8), *torch.randn(2, 2, 4, 6, 8))
