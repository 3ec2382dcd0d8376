"""Losses of the fit: attention weights, attention outputs, and whole-model outputs. No labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from passes.forms.exact import Exact
from passes.substitute import AttentionModule
from rewriter.capture import Call
from rewriter.fidelity import embedding, token_mask

TINY = 1e-12


def row_mask(attention: AttentionModule, call: Call) -> Tensor:
    """[B, 1, T, 1] float, 1 where the query counts; padded queries of self-attention do not."""
    batch, _, queries, _ = call.q.shape
    mask = call.key_mask
    if mask is None or attention.site.cross or mask.shape[-1] != queries:
        return call.q.new_ones(batch, 1, queries, 1)
    return mask.to(call.q.dtype).expand(batch, -1)[:, None, :, None]


def teacher_weights(attention: AttentionModule, call: Call) -> Tensor:
    """Softmax weights [B, H, T, S] of the original at the call's q and k."""
    return Exact().weights(attention.spec, {}, call.q, call.k, call.key_mask, call.bias)


def divergence(attention: AttentionModule, call: Call, target: Tensor | None = None) -> Tensor:
    """Mean KL divergence of the form's weight rows from `target` (softmax by default), nats.

    Has the gradient of the cross-entropy on attention weights (Zhang et al. 2024, eq. 7).
    """
    return head_divergences(attention, call, target).mean()


def head_divergences(
    attention: AttentionModule, call: Call, target: Tensor | None = None
) -> Tensor:
    """`divergence` of each head: [H]."""
    want = teacher_weights(attention, call) if target is None else target
    params = dict(attention.params.items())
    got = attention.form.weights(attention.spec, params, call.q, call.k, call.key_mask, call.bias)
    if not attention.form.normalised:  # or growing all weights would look like a gain
        got = got / got.abs().sum(-1, keepdim=True).clamp_min(TINY)
    got = got.clamp_min(TINY)
    rows = torch.xlogy(want, want).sum(-1, keepdim=True) - (want * got.log()).sum(-1, keepdim=True)
    mask = row_mask(attention, call)
    return (rows * mask).sum((0, 2, 3)) / mask.sum().clamp_min(1)


def output_error(attention: AttentionModule, call: Call, want: Tensor | None = None) -> Tensor:
    """Squared relative error of the attention output, each head by its own size, then the mean."""
    want = call.out if want is None else want
    mask = row_mask(attention, call)
    got = attention(call.q, call.k, call.v, call.key_mask, call.bias)
    wrong: Tensor = ((got - want).square() * mask).sum((0, 2, 3))
    size = (want.square() * mask).sum((0, 2, 3))
    error: Tensor = wrong / size.clamp_min(TINY)
    return error.mean()


def floating(outputs: Any) -> list[Tensor]:
    """All floating tensors of a model's outputs, in order."""
    leaves = pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def masked_error(got: Tensor, want: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Squared relative error of a [B, ...] tensor, padded token rows left out."""
    mask = token_mask(batch, want)
    wrong: Tensor = (got - want).square()
    size = want.square()
    if mask is not None:
        wrong, size = wrong * mask[..., None], size * mask[..., None]
    return wrong.sum() / size.sum().clamp_min(TINY)


def embedding_loss(got: Tensor, want: Tensor) -> Tensor:
    """1 - cosine of matching rows [B, C], and how far the batch's own similarities moved.

    The second part keeps neighbours neighbours; both centred on nothing, so scale is free.
    """
    a, b = F.normalize(got.float(), dim=-1), F.normalize(want.float(), dim=-1)
    cosine = (1 - (a * b).sum(-1)).mean()
    return cosine + (a @ a.T - b @ b.T).square().mean()


def model_loss(
    got: Any,
    want: Any,
    taps: list[tuple[Tensor, Tensor]],
    batch: Mapping[str, Tensor],
) -> Tensor:
    """Loss of the end-to-end stage.

    Five times the embedding loss, the relative error of every output, and half the mean relative
    error of the hidden states `taps` (pairs got, want).
    """
    loss = 5.0 * embedding_loss(embedding(got, batch), embedding(want, batch))
    for a, b in zip(floating(got), floating(want), strict=True):
        loss = loss + masked_error(a.float(), b.float(), batch)
    if taps:
        hidden = [masked_error(a.float(), b.float(), batch) for a, b in taps]
        loss = loss + 0.5 * torch.stack(hidden).sum() / len(hidden)
    return loss
