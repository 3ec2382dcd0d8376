"""What forms that work on rows of scores share: products with grouped heads."""

from __future__ import annotations

import torch


def scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """scale q k^T: q [B, H, T, D], k [B, G, S, D] -> [B, H, T, S]."""
    batch, heads, queries, width = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, width) @ k.transpose(-1, -2)
    return grouped.reshape(batch, heads, queries, -1) * scale


def times_values(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """weights v in the weights' type: [B, H, T, S] and [B, G, S, E] -> [B, H, T, E]."""
    batch, heads, queries, keys = weights.shape
    grouped = weights.reshape(batch, v.shape[1], -1, keys) @ v.to(weights.dtype)
    return grouped.reshape(batch, heads, queries, -1)
