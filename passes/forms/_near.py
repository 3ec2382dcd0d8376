"""The window and linear hybrid token by token: keys near a query are held, older ones are sums.

Tokens are cut into blocks of C. A query meets its own block and the one before by softmax terms,
earlier ones by features. The last two blocks stand in a ring of 2 C places (token j at j mod 2 C);
next to it the sums of either block are kept, and they join the sums of all older blocks when the
block's place is taken again. Nothing grows with the tokens. Letters as in passes/site.py; F is the
number of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from passes.decode_form import BLOCK, StateSpec
from passes.forms._linear import dtype_name
from passes.site import AttentionSite


@dataclass(frozen=True)
class Heads:
    """Of new tokens: q [B, G, H/G, T, D], k [B, G, T, D], v [B, G, T, E] and the features
    fq [B, G, H/G, T, F] and fk [B, G, T, F]; share [G, H/G] weighs the softmax terms."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    fq: torch.Tensor
    fk: torch.Tensor
    share: torch.Tensor


def ring_state(site: AttentionSite, window: int, features: int) -> tuple[StateSpec, ...]:
    """keys [B, G, blocks, D, BLOCK] and values of the ring, rounded up to blocks of the cache;
    sums and norms of its two blocks (`part`) and of all older ones."""
    d, blocks = site.dims, -(-2 * window // BLOCK)
    kind, lead = "float64" if dtype_name(site.dtype) == "float64" else "float32", (int(d.B), d.G)
    return (
        StateSpec("keys", (*lead, blocks, d.D, BLOCK), kind),
        StateSpec("values", (*lead, blocks * BLOCK, d.E), kind),
        StateSpec("part", (*lead, 2, features, d.E), kind),
        StateSpec("part_norm", (*lead, 2, features), kind),
        StateSpec("sum", (*lead, features, d.E), kind),
        StateSpec("norm", (*lead, features), kind),
    )


def ring_step(
    heads: Heads,
    state: Sequence[torch.Tensor],
    first: int,
    *,
    window: int,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(output [B, G, H/G, T, E], new state) for tokens from position `first` on."""
    new, done, at = [x.clone() for x in state], [], 0
    tokens = heads.k.shape[2]
    while at < tokens:
        number = min(tokens - at, window - (first + at) % window)  # all of one block
        part = slice(at, at + number)
        piece = Heads(
            heads.q[:, :, :, part], heads.k[:, :, part], heads.v[:, :, part],
            heads.fq[:, :, :, part], heads.fk[:, :, part], heads.share,
        )  # fmt: skip
        _take(piece, new, first + at, window)
        done.append(_read(piece, new, first + at, window, scale, eps))
        at += number
    return torch.cat(done, 3), new


def _take(heads: Heads, state: list[torch.Tensor], first: int, window: int) -> None:
    """Put the tokens of one block into the state."""
    keys, values, part, part_norm, sums, norm = state
    half = first // window % 2
    if first % window == 0:  # the block before the last one leaves the ring
        sums += part[:, :, half]
        norm += part_norm[:, :, half]
        part[:, :, half] = 0.0
        part_norm[:, :, half] = 0.0
    place = first % (2 * window) + torch.arange(heads.k.shape[2])
    keys[:, :, place // BLOCK, :, place % BLOCK] = heads.k.permute(2, 0, 1, 3)
    values[:, :, place] = heads.v
    part[:, :, half] += heads.fk.transpose(-1, -2) @ heads.v
    part_norm[:, :, half] += heads.fk.sum(-2)


def _read(
    heads: Heads,
    state: Sequence[torch.Tensor],
    first: int,
    window: int,
    scale: float,
    eps: float,
) -> torch.Tensor:
    keys, values, _, _, sums, norm = state
    size = 2 * window
    held = keys.transpose(-1, -2).flatten(2, 3)[:, :, None, :size]
    logits = heads.q @ held.transpose(-1, -2) * scale
    row = first + torch.arange(heads.q.shape[3])[:, None]
    token = row - (row - torch.arange(size)) % size  # the last one up to the query at each place
    seen = (token >= 0) & (token // window >= row // window - 1)
    logits = logits.masked_fill(~seen, -torch.inf)
    terms = (logits - logits.amax(-1, keepdim=True)).exp() * heads.share[:, :, None, None]
    top = terms @ values[:, :, None, :size] + heads.fq @ sums[:, :, None]
    bottom = terms.sum(-1) + (heads.fq @ norm[:, :, None, :, None]).squeeze(-1)
    return top / bottom.clamp_min(eps)[..., None]
