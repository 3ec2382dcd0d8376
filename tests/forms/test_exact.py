"""exact against softmax written out, in all its masks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from passes.form import Reason, form_named
from passes.forms.exact import Exact
from tests.by_hand import site


def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, bias: Tensor
) -> Tensor:
    """Row by row; `hidden` and `bias` [B, H, T, S]."""
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(batch, heads, queries, v.shape[-1], dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                keep = ~hidden[b, h, i]
                if keep.any():
                    logits = scale * (k[b, h // group][keep] @ q[b, h, i]) + bias[b, h, i][keep]
                    power = (logits - logits.max()).exp()
                    out[b, h, i] = power @ v[b, h // group][keep] / power.sum()
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (1, 0), (2, 3)])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("bias_kind", ["", "float", "bool", "-inf"])
def test_all_masks_together(
    causal: bool, window: tuple[int, int] | None, padding: bool, bias_kind: str
) -> None:
    b, h, g, t, s = 2, 4, 2, 6, 8
    q, k, v = (torch.randn(b, n, m, w).double() for n, m, w in ((h, t, 5), (g, s, 5), (g, s, 3)))
    row, column = torch.arange(t)[:, None] + s - t, torch.arange(s)[None]
    hidden = torch.zeros(b, h, t, s, dtype=torch.bool)
    if causal:
        hidden |= column > row
    if window is not None:
        hidden |= (column < row - window[0]) | (column > row + window[1])
    key_mask = torch.rand(b, s) > 0.5 if padding else None
    if key_mask is not None:
        hidden |= ~key_mask[:, None, None]
    shown, added = None, torch.zeros(b, h, t, s).double()
    if bias_kind == "bool":
        shown = torch.rand(1, h, t, s) > 0.3
        hidden |= ~shown
    elif bias_kind:
        shown = torch.randn(b, 1, t, s).double()
        if bias_kind == "-inf":
            shown = shown.masked_fill(torch.rand(b, 1, t, s) > 0.5, -math.inf)
            hidden = hidden | (shown == -math.inf)
        added = added + shown
    at = site(
        H=h, G=g, causal=causal, padding=padding, window=window, bias=bool(bias_kind), scale=0.7
    )
    form = Exact()
    spec = form.spec(at)
    want = reference(q, k, v, 0.7, hidden, added)
    got = form.attend(spec, {}, q, k, v, key_mask, shown)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weights = form.weights(spec, {}, q, k, key_mask, shown)
    assert (weights[hidden] == 0).all()
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), want, rtol=1e-10, atol=1e-10)


def test_blind_rows_have_finite_gradients() -> None:
    form, at = Exact(), site(H=2, T=4, D=5, padding=True)
    q, k, v = (torch.randn(2, 2, 4, 5, dtype=torch.double, requires_grad=True) for _ in range(3))
    key_mask = torch.ones(2, 4, dtype=torch.bool)
    key_mask[0] = False
    (form.weights(form.spec(at), {}, q, k, key_mask) @ v).square().sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert (tensor.grad[0] == 0).all()


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    form, at = Exact(), site(B=1, H=1, T=4, S=400, D=4)
    q, k = torch.randn(1, 1, 4, 4), 0.1 * torch.randn(1, 1, 400, 4)
    v = torch.ones(1, 1, 400, 1)
    spec = form.spec(at)
    out = form.attend(spec, {}, q, k, v, dropout=0.5)
    assert (out - 1).abs().max() > 1e-4
    assert (out - 1).abs().max() < 0.5
    torch.testing.assert_close(form.attend(spec, {}, q, k, v), torch.ones(1, 1, 4, 1))


def test_refusals() -> None:
    form = form_named("exact")
    assert form.applies(site(causal=True, bias=True, unknown=True, window=(1, 1)))
    assert form.applies(site(H=6, G=4)).reason is Reason.GROUPED
    assert form.applies(site(dtype="int64")).reason is Reason.DTYPE
