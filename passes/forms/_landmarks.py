"""Landmarks: means of runs of neighbouring visible tokens, in torch, and their closed count.

The r-th of n visible tokens belongs to run r min(m, n) // n of m: runs of almost equal length,
wherever hidden tokens lie, so hidden tokens could as well be absent.
"""

from __future__ import annotations

import torch

from passes.form import Reason, Verdict, no
from passes.forms._linear import count_dtype, item_bytes, linear_verdict
from passes.opcount import OpCount
from passes.site import AttentionSite


def landmark_verdict(site: AttentionSite, name: str) -> Verdict:
    """Padding masks, cross attention, grouped heads; landmarks see the future, so no causality."""
    if site.mask.causal:
        return no(
            Reason.MASK_CAUSAL,
            f"{site.id} is causal; the landmarks of {name} are means over later tokens too",
        )
    return linear_verdict(site, name)


def share_of(tokens: int, m: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """What each token is of each landmark, float64 [B or 1, m, S]; rows sum to one or are 0."""
    mask = torch.ones(1, tokens, dtype=torch.bool) if key_mask is None else key_mask
    number = mask.sum(-1, keepdim=True)
    rank = mask.cumsum(-1) - 1
    run = (rank * number.clamp_max(m)) // number.clamp_min(1)
    inside = (run[:, None] == torch.arange(m, device=mask.device)[:, None]) & mask[:, None]
    return inside.double() / inside.sum(-1, keepdim=True).clamp_min(1)


def segment_means(x: torch.Tensor, m: int, key_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Landmarks [B, G, m, D] of x [B, G, S, D] in x's type; 0 where a run has no token."""
    return share_of(x.shape[2], m, key_mask).to(x.device, x.dtype)[:, None] @ x


def filled(m: int, key_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which landmarks have a token, bool [B or 1, m]; None without a mask."""
    if key_mask is None:
        return None
    return torch.arange(m, device=key_mask.device) < key_mask.sum(-1, keepdim=True)


def segment_ops(b: int, heads: int, tokens: int, d: int, m: int, site: AttentionSite, *,
                mask_rows: int = 0) -> OpCount:  # fmt: skip
    """Means of runs of x [b, heads, tokens, d]; `mask_rows` of a key mask (0: none).

    sums        add b*heads*tokens*d, select as many with a mask
    lengths     add b*tokens; max and div b*m; mul b*heads*m*d
    places      add b*tokens (int32), with a mask twice that
    """
    values, marks = b * heads * tokens * d, b * heads * m * d
    floats = OpCount.of(
        count_dtype(site),
        add=values + b * tokens,
        select=values if mask_rows else 0,
        max=b * m,
        div=b * m,
        mul=marks,
        read=values * item_bytes(site) + mask_rows * tokens,
        written=marks * item_bytes(site),
    )
    return floats + OpCount.of("int32", add=b * tokens * (2 if mask_rows else 1))


def filled_ops(mask_rows: int, tokens: int, m: int) -> OpCount:
    """Counting the visible tokens: add mask_rows*tokens (int32)."""
    if not mask_rows:
        return OpCount()
    rows = mask_rows * tokens
    return OpCount.of("int32", add=rows, read=rows, written=mask_rows * m)
