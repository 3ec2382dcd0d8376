"""nystrom: softmax attention by way of landmarks and a pseudo-inverse (Xiong et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from passes.form import FormConfig, FormSpec, Paper
from passes.forms._landmark_form import LandmarkForm, whole_number
from passes.forms._landmarks import filled, filled_ops, segment_means, segment_ops
from passes.forms._linear import accumulate_dtype, count_dtype, item_bytes, sizes
from passes.forms._rows import times_values
from passes.forms.exact import Exact
from passes.opcount import OpCount
from passes.site import AttentionSite, Mask


@dataclass(frozen=True)
class NystromConfig(FormConfig):
    """`landmarks` m of queries and as many of keys; `steps` of the inverse's iteration.

    Few steps leave small singular values out, which helps where heads are sharp; 20 reach the
    pseudo-inverse.
    """

    landmarks: int = 64
    steps: int = 6

    def __post_init__(self) -> None:
        whole_number("landmarks", self.landmarks, 512)
        whole_number("steps", self.steps, 100)


class Nystrom(LandmarkForm):
    """F A^+ B v of three softmax matrices: queries and landmark queries against (landmark) keys.

    Landmarks are means of neighbouring tokens, so it holds where neighbours are alike; with all
    tokens as landmarks it is softmax, and where there are no more tokens than landmarks exact
    attention is used, which is cheaper then. Hidden keys enter no landmark. Without the paper's
    convolution over the values. Weights can be negative; in time linear in the tokens.
    """

    name = "nystrom"
    paper = Paper(
        "Xiong, Zeng, Chakraborty, Tan, Fung, Li, Singh",
        "Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention",
        2021,
        "https://arxiv.org/abs/2102.03902",
    )
    formula = "softmax(s q k~^T) softmax(s q~ k~^T)^+ softmax(s q~ k^T) v,  ~ means of runs"
    Config = NystromConfig

    def low_rank(
        self,
        spec: FormSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `low_rank` below, by this form's options."""
        return low_rank(spec, self.options, q, k, v, key_mask)

    def ops(self, site: AttentionSite) -> OpCount:
        """Exact attention for few tokens; else landmarks, B v, A^+ B v, F A^+ B v.

        The two products with values are exact attention of m queries and of m keys; for the
        pseudo-inverse see `inverse_ops`.
        """
        b, h, g, t, s, d, _ = sizes(site)
        if self.dense(t, s):
            return Exact().ops(site)
        m, rows = self.options.landmarks, b if site.mask.padding else 0
        few = replace(site, dims=replace(site.dims, T=m))
        back = replace(
            site, dims=replace(site.dims, G=h, S=m), mask=replace(Mask(), padding=rows > 0)
        )
        return (
            segment_ops(b, h, t, d, m, site)
            + segment_ops(b, g, s, d, m, site, mask_rows=rows)
            + filled_ops(rows, s, m)
            + Exact().ops(few)
            + inverse_ops(self.options.steps, m, site, masked=rows > 0)
            + Exact().ops(back)
        )

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
        """Means, exact attention of the landmark queries, the inverse, exact attention of all."""
        if self.dense(kit.tokens(q), kit.tokens(k)):
            return Exact().kernel(kit, spec, {}, q, k, v, key_mask)
        m, dtype = self.options.landmarks, kit.dtype(q)
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        marks_q, marks_k = kit.segment_means(q, m), kit.segment_means(k, m, key_mask)
        seen = kit.filled_segments(key_mask, m)
        first = kit.exact_attention(marks_q, k, v, key_mask=key_mask, scale=spec.scale)
        middle = kit.apply_pseudo_inverse(
            marks_q, marks_k, first, key_mask=seen, scale=spec.scale, steps=self.options.steps
        )
        wide = kit.repeat_heads(marks_k, kit.heads(q))
        out = kit.exact_attention(q, wide, middle, key_mask=seen, scale=spec.scale)
        return kit.cast(out, dtype)


def low_rank(
    spec: FormSpec,
    options: NystromConfig,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """F A^+ B v [B, H, T, E] through landmarks, however many tokens there are."""
    wide, m, exact = accumulate_dtype(q.dtype), options.landmarks, Exact()
    dtype, inner = q.dtype, FormSpec(Exact.name, False, spec.scale)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    marks_q, marks_k = segment_means(q, m), segment_means(k, m, key_mask)
    seen = filled(m, key_mask)
    values = times_values(exact.weights(inner, {}, marks_q, k, key_mask), v)
    middle = exact.weights(inner, {}, marks_q, marks_k, seen)
    values = pseudo_inverse(middle, options.steps) @ values
    return times_values(exact.weights(inner, {}, q, marks_k, seen), values).to(dtype)


def pseudo_inverse(a: torch.Tensor, steps: int) -> torch.Tensor:
    """A^+ [.., m, m] of a [.., m, m] whose rows sum to one or are 0, by Razavi's iteration."""
    largest = a.sum(-2).amax(-1)[..., None, None].clamp_min(1e-30)
    z, one = a.transpose(-1, -2) / largest, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(steps):
        p = a @ z
        z = 0.25 * z @ (13 * one - p @ (15 * one - p @ (7 * one - p)))
    return z


def inverse_ops(steps: int, m: int, site: AttentionSite, *, masked: bool) -> OpCount:
    """A = softmax(scale q~ k~^T), its pseudo-inverse and the product with [m, E], B*H times.

    scale and scores   mul m*D (not for scale 1), mul and add m*m*D, select m*m with a mask
    softmax            max, exp and 2 add m*m, max and div m, mul m*m
    start              add and mul m*m, max m, div 1
    each step          mul and add 4 m*m*m, add 3 m*m, mul m*m
    product            mul and add m*m*E
    """
    b, h, g, _, _, d, e = sizes(site)
    square, size = m * m, item_bytes(site)
    one = OpCount.of(
        count_dtype(site),
        mul=(m * d if site.scale != 1.0 else 0)
        + square * (d + 2 + e)
        + steps * square * (4 * m + 1),
        add=square * (d + 3 + e) + steps * square * (4 * m + 3),
        select=square if masked else 0,
        max=square + 2 * m,
        exp=square,
        div=m + 1,
    )
    moved = OpCount.of(
        read=(b * (h + g) * m * d + b * h * m * e) * size + (b * m if masked else 0),
        written=b * h * m * e * size,
    )
    return one * (b * h) + moved
