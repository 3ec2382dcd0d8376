"""exact: softmax attention itself, the baseline every other form is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from passes.decode_form import CachedStreaming
from passes.form import FormSpec, Paper, Params, Verdict
from passes.forms._linear import (
    accumulate_dtype,
    count_dtype,
    group_verdict,
    item_bytes,
    sizes,
    visible,
)
from passes.opcount import OpCount
from passes.site import AttentionSite


class Exact(CachedStreaming):
    """Softmax attention with any mask.

    A query that sees no key (all hidden by `key_mask`, a bool `bias`, -inf in a float `bias`,
    causality or the window) gives 0, never NaN.
    """

    name = "exact"
    family = "exact"
    paper = Paper(
        "Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin",
        "Attention Is All You Need",
        2017,
        "https://arxiv.org/abs/1706.03762",
    )
    formula = "softmax(scale * q k^T + bias) v"
    exact = True

    def applies(self, site: AttentionSite) -> Verdict:
        """Every mask; only head counts that do not divide and non-float types are refused."""
        return group_verdict(site)

    def attend(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Softmax attention [B, H, T, E]; `dropout` (used in training) drops weights."""
        square = q.shape[-2] == k.shape[-2]
        plain = key_mask is None and bias is None and spec.window is None
        fast = spec.causal and plain and square
        mask = None if fast else _mask(spec, q, k, key_mask, bias)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=fast,
            scale=spec.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Softmax weights [B, H, T, S] in q's dtype; rows that see no key are 0."""
        wide = accumulate_dtype(q.dtype)
        batch, heads, queries, width = q.shape
        grouped = q.to(wide).reshape(batch, k.shape[1], -1, width)
        scores = (grouped @ k.to(wide).transpose(-1, -2)) * spec.scale
        scores = scores.reshape(batch, heads, queries, -1)
        mask = _mask(spec, q, k, key_mask, bias)
        if mask is None:
            return scores.softmax(-1).to(q.dtype)
        seen = mask if mask.dtype == torch.bool else mask > -torch.inf
        if mask.dtype != torch.bool:
            scores = scores + mask.to(wide).masked_fill(~seen, 0.0)
        # A blind row keeps finite scores, so that neither it nor its gradient is NaN.
        hidden = ~seen & seen.any(-1, keepdim=True)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return weights.masked_fill(~seen, 0.0).to(q.dtype)

    def ops(self, site: AttentionSite) -> OpCount:
        """Closed count; the division comes after the sum over values.

        scale           mul B*H*T*D on q (not for scale 1)
        scores          mul and add B*H*T*S*D
        bias            add B*H*T*S (taken as float; also for a mask that was not understood)
        hidden keys     select B*H*T*S, once for causal, window and padding together
        softmax         max, add (subtract the row maximum), exp, add (sum): B*H*T*S each
        values          mul and add B*H*T*S*E
        blind rows      max B*H*T (clamp of the sum; only where there is a mask or bias)
        divide          div B*H*T*E
        """
        b, h, g, t, s, d, e = sizes(site)
        mask, rows = site.mask, b * h * t
        pairs = rows * s
        biased = mask.bias or mask.unknown
        hiding = mask.causal or mask.padding or mask.window is not None
        read = rows * d + b * g * s * (d + e) + (pairs if biased else 0)
        return OpCount.of(
            count_dtype(site),
            mul=pairs * (d + e) + (rows * d if site.scale != 1.0 else 0),
            add=pairs * (d + e + 2) + (pairs if biased else 0),
            select=pairs if hiding else 0,
            max=pairs + (rows if hiding or biased else 0),
            exp=pairs,
            div=rows * e,
            read=read * item_bytes(site) + (b * s if mask.padding else 0),
            written=rows * e * item_bytes(site),
        )

    def counted(self, site: AttentionSite) -> OpCount:
        """EcoFormer's rule (Liu et al. 2022, released counter): the softmax itself is free.

        products q k^T and weights v   mul and add B*H*T*S*(D + E)
        scale                          mul B*H*T*S
        """
        b, h, _, t, s, d, e = sizes(site)
        pairs = b * h * t * s
        return OpCount.of(mul=pairs * (d + e + 1), add=pairs * (d + e))

    def kernel(
        self,
        kit: Any,
        spec: FormSpec,
        params: Mapping[str, Any],
        q: Any,
        k: Any,
        v: Any,
        key_mask: Any = None,
        bias: Any = None,
    ) -> Any:
        """One fused kernel."""
        return kit.exact_attention(
            q,
            k,
            v,
            key_mask=key_mask,
            bias=bias,
            causal=spec.causal,
            window=spec.window,
            scale=spec.scale,
        )


def _mask(
    spec: FormSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor | None:
    """All that hides or weighs keys as one tensor: bool (True = seen), or float with -inf."""
    seen = visible(spec, q.shape[-2], k.shape[-2], q.device)
    if key_mask is not None:
        keys = key_mask[:, None, None, :]
        seen = keys if seen is None else keys & seen
    if bias is None:
        return seen
    if bias.dtype == torch.bool:
        return bias if seen is None else bias & seen
    bias = bias.to(q.dtype)
    return bias if seen is None else bias.masked_fill(~seen, -torch.inf)
