"""Attention without a softmax denominator: sums over keys, divided by their number or normed.

The kernels divide by `HUGE` = 2^60 (exact), the limit they put on a denominator, and the step after
them takes it back; the sums here do the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from passes.form import FormSpec
from passes.forms._features import count, wide
from passes.forms._linear import linear_attention, linear_attention_ops, sizes, visible
from passes.opcount import OpCount
from passes.site import AttentionSite

HUGE = 2.0**60


def linear_sum(
    fq: torch.Tensor,
    fk: torch.Tensor,
    v: torch.Tensor,
    *,
    key_mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """sum_j (fq_i . fk_j) v_j over the visible keys: [B, H, T, E], float32 for 16-bit data."""
    out = linear_attention(fq, fk, wide(v), key_mask=key_mask, causal=causal, eps=HUGE)
    return out * HUGE


def counts(
    spec: FormSpec, queries: int, key_mask: torch.Tensor | None, keys: int, device: torch.device
) -> torch.Tensor:
    """How many keys each query sees, int64 [B or 1, 1, T, 1]."""
    mask = torch.ones(1, keys, dtype=torch.bool, device=device) if key_mask is None else key_mask
    if not spec.causal:
        return mask.sum(-1)[:, None, None, None].expand(-1, 1, queries, 1)
    until = torch.arange(queries, device=device) + (keys - queries) + 1
    before = torch.nn.functional.pad(mask.cumsum(-1), (1, 0))
    return before[:, until.clamp(0, keys)][:, None, :, None]


def mean_weights(
    fq: torch.Tensor,
    fk: torch.Tensor,
    spec: FormSpec,
    key_mask: torch.Tensor | None,
    scale: float = 1.0,
) -> torch.Tensor:
    """scale fq.fk over the number of visible keys, 0 at hidden ones: [B, H, T, S]; quadratic."""
    batch, heads, queries, width = fq.shape
    groups, keys = fk.shape[1], fk.shape[2]
    grouped = fq.reshape(batch, groups, -1, width)
    scores = (grouped @ fk.transpose(-1, -2)).reshape(batch, heads, queries, keys)
    seen = visible(spec, queries, keys, fq.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, 0.0)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], 0.0)
    number = counts(spec, queries, key_mask, keys, fq.device)
    return scores * (scale / number.clamp_min(1).to(scores.dtype))


def mean_ops(site: AttentionSite) -> OpCount:
    """Dividing by the number of keys: div B*H*T*E, max for each number.

    With a padding mask the numbers are themselves sums, of ones (B*T; else T numbers known before).
    """
    b, h, _, t, _, _, e = sizes(site)
    numbers = b * t if site.mask.padding else t
    n = b * h * t * e
    total = count(site, n, n + numbers, div=n, max=numbers)
    if site.mask.padding:
        dims = replace(site.dims, H=1, G=1, D=1, E=1)
        total += linear_attention_ops(replace(site, dims=dims), 1)
    return total
