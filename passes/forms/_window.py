"""Softmax near a query and linear attention far from it, block by block (the form lolcats)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from passes.form import FormSpec
from passes.forms._features import wide


class Blocks:
    """q [B, H, T, D], k [B, G, T, D], v [B, G, T, E] cut into blocks of `size` tokens.

    Near a query are its own block and the neighbouring ones (causal: the one before).
    """

    def __init__(
        self,
        size: int,
        spec: FormSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
    ) -> None:
        self.size, self.spec, self.tokens = size, spec, q.shape[2]
        self.number = -(-self.tokens // size)
        self.batch, self.heads, self.groups = q.shape[0], q.shape[1], k.shape[1]
        mask = torch.ones(1, self.tokens, dtype=torch.bool, device=q.device)
        self.mask = mask if key_mask is None else key_mask
        self.q, self.k, self.v = self._cut(q), self._cut(k), self._cut(v)

    def _cut(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H or G, T, X] -> [B, G, H/G or 1, n, C, X], zeros after the last token."""
        x = F.pad(wide(x), (0, 0, 0, self.number * self.size - self.tokens))
        return x.reshape(self.batch, self.groups, -1, self.number, self.size, x.shape[-1])

    def attend(
        self, fq: torch.Tensor, fk: torch.Tensor, share: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """[B, H, T, E] with features fq [B, H, T, R], fk [B, G, T, R], share [H]."""
        fk = fk.masked_fill(~self.mask[:, None, :, None], 0.0)
        values = F.pad(self.v, (0, 1), value=1.0)  # the denominator rides along
        far = self._far(self._cut(fk).transpose(-1, -2) @ values)
        both = self._near(values, share) + self._cut(fq) @ far
        out = both[..., :-1] / both[..., -1:].clamp_min(eps)
        return out.reshape(self.batch, self.heads, -1, out.shape[-1])[:, :, : self.tokens]

    def _far(self, parts: torch.Tensor) -> torch.Tensor:
        """Sums of the parts [B, G, 1, n, R, E] of the blocks that are not near each block."""
        whole = parts.shape[3]
        shift = (0, 0, 0, 0, 2, 0)
        earlier = F.pad(parts.cumsum(3), shift)[:, :, :, :whole]
        if self.spec.causal:
            return earlier
        later = F.pad(parts.flip(3).cumsum(3), shift)[:, :, :, :whole].flip(3)
        return earlier + later

    def _around(self, x: torch.Tensor) -> torch.Tensor:
        """The blocks near each block beside each other: [.., n, C, X] -> [.., n, 2 C or 3 C, X]."""
        after = 0 if self.spec.causal else 1
        padded = F.pad(x, (0, 0, 0, 0, 1, after))
        parts = [padded[..., s : s + self.number, :, :] for s in range(2 + after)]
        return torch.cat(parts, -2)

    def _near(self, values: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Softmax terms relative to their maximum times the values: [B, G, H/G, n, C, E]."""
        seen = self._seen()
        logits = (self.q @ self._around(self.k).transpose(-1, -2)) * self.spec.scale
        logits = logits.masked_fill(~seen, -torch.inf)
        top = logits.amax(-1, keepdim=True)
        terms = (logits - top.masked_fill(top == -torch.inf, 0.0)).exp()
        return (terms @ self._around(values)) * share.reshape(1, self.groups, -1, 1, 1, 1)

    def _seen(self) -> torch.Tensor:
        """[B or 1, 1, 1, n, C, 2 C or 3 C] bool: which of the keys near are visible."""
        fill = self.number * self.size - self.tokens
        mask = F.pad(self.mask, (0, fill)).reshape(-1, 1, 1, self.number, self.size, 1)
        keys = self._around(mask.to(self.q.dtype)).transpose(-1, -2) > 0
        if not self.spec.causal:
            return keys
        token = torch.arange(self.size, device=keys.device)
        place = torch.arange(-self.size, self.size, device=keys.device)
        return keys & (place[None] <= token[:, None])
