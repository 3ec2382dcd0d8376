"""soft: a Gaussian kernel through landmarks and Newton's inverse (Lu et al. 2021, 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from passes.errors import UsageError
from passes.form import FormConfig, FormSpec, Paper
from passes.forms._landmark_form import LandmarkForm, whole_number
from passes.forms._landmarks import filled, filled_ops, segment_means, segment_ops
from passes.forms._linear import accumulate_dtype, count_dtype, item_bytes, sizes
from passes.forms._rows import times_values
from passes.forms.exact import Exact
from passes.forms.gaussian import _sides
from passes.opcount import OpCount
from passes.site import AttentionSite, Mask

GUARD = 0.01  # least part of a denominator's terms, without their signs, that it may be
LEAST = 1e-30


@dataclass(frozen=True)
class SoftConfig(FormConfig):
    """`landmarks` m, `ridge` on their matrix's diagonal, `steps` of Newton's iteration.

    The paper's ridge is 0.01. Rounding errors of float32 grow as it falls: compiled code was out by
    1e-5 of its output with 0.01 on random keys, where `rewriter compile` allows no more.
    """

    landmarks: int = 64
    ridge: float = 0.1
    steps: int = 20

    def __post_init__(self) -> None:
        whole_number("landmarks", self.landmarks, 512)
        whole_number("steps", self.steps, 50)
        if not isinstance(self.ridge, int | float) or not 1e-6 <= self.ridge <= 1.0:
            raise UsageError(f"ridge: a number from 1e-6 to 1, got {self.ridge!r}")


class Soft(LandmarkForm):
    """K(q, l) (K(l, l) + ridge I)^-1 K(l, k) e^(scale |k|^2 / 2) [v, 1], over its last channel.

    K(x, y) = exp(-scale |x - y|^2 / 2) and l are means of neighbouring keys. The published form has
    q = k, no last factor and no division, and is trained so; with both the kernel is that of
    softmax (|q|^2 cancels), so a trained model can start from it. With all keys as landmarks and a
    small ridge it is softmax, and where there are no more tokens than landmarks exact attention is
    used. A denominator that signs nearly cancel is kept at 1/100 of its terms.
    """

    name = "soft"
    paper = Paper(
        "Lu, Yao, Zhang, Zhu, Xu, Gao, Xu, Xiang, Zhang",
        "SOFT: Softmax-free Transformer with Linear Complexity",
        2021,
        "https://arxiv.org/abs/2110.11945",
    )
    formula = "K(q, l) (K(l, l) + r I)^-1 K(l, k) e^(s |k|^2 / 2) v, rows divided by their sums"
    needs = "nothing"
    Config = SoftConfig

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
        """Exact attention for few tokens; else, with W = E + 1 channels of values,

        landmarks   their means; mul B*G*m*(D + 1), add B*G*m*D of their lengths, twice
        keys        mul and add B*G*S*D, max (select with a mask) B*G*S, mul B*G
        sums        scale mul B*G*m*(D + 2); mul and add B*G*m*S*(D + 2 + W), exp B*G*m*S
        solution    see `solve_ops`
        read        exact attention of m keys with D + 1 and E + 2 channels
        division    2 max, div B*H*T; mul B*H*T*E
        """
        b, h, g, t, s, d, e = sizes(site)
        if self.dense(t, s):
            return Exact().ops(site)
        m, masked, size = self.options.landmarks, site.mask.padding, item_bytes(site)
        rows, dtype, marks, keys = b if masked else 0, count_dtype(site), b * g * m, b * g * s
        scaled = marks * (d + 2) if site.scale != 1.0 else 0
        made = OpCount.of(
            dtype,
            mul=2 * marks * (d + 1) + keys * d + b * g + scaled + marks * s * (d + e + 3),
            add=2 * marks * d + keys * d + marks * s * (d + e + 3),
            max=keys + 2 * b * h * t,
            select=(keys + marks * s) if masked else 0,
            exp=marks * s,
            div=b * h * t,
            read=(marks * (2 * d + d + 2) + keys * (d + d + 2 + e + 1) + b * h * t * (e + 2))
            * size,
            written=(marks * (2 * d + 3 + e + 1) + keys * (d + 2) + b * h * t * e) * size,
        )
        out = OpCount.of(dtype, mul=b * h * t * e)
        dims = replace(site.dims, S=m, D=d + 1, E=e + 2)
        inner = replace(site, dims=dims, mask=replace(Mask(), padding=masked))
        return (
            segment_ops(b, g, s, d, m, site, mask_rows=rows)
            + filled_ops(rows, s, m)
            + made
            + out
            + solve_ops(self.options.steps, m, site)
            + Exact().ops(inner)
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
        """Means, sums over keys at the landmarks, the solution, exact attention to landmarks."""
        if self.dense(kit.tokens(q), kit.tokens(k)):
            return Exact().kernel(kit, spec, {}, q, k, v, key_mask)
        o, dtype, scale = self.options, kit.dtype(q), spec.scale
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        marks = kit.segment_means(k, o.landmarks, key_mask)
        seen = kit.filled_segments(key_mask, o.landmarks)
        sums = kit.kernel_sums(
            kit.extend(marks, -0.5, one=True),
            kit.lift_keys(k, key_mask),
            kit.with_ones(v),
            key_mask=key_mask,
            scale=scale,
        )
        solved = kit.solve_gaussian(
            marks, sums, key_mask=seen, scale=scale, ridge=float(o.ridge), steps=o.steps
        )
        out = kit.exact_attention(
            kit.with_ones(q), kit.extend(marks, -0.5, one=False), solved, key_mask=seen, scale=scale
        )
        return kit.cast(kit.ratio(out, LEAST), dtype)


def low_rank(
    spec: FormSpec,
    options: SoftConfig,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention [B, H, T, E] through landmarks, however many tokens there are."""
    wide, m, dtype = accumulate_dtype(q.dtype), options.landmarks, q.dtype
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    marks, seen = segment_means(k, m, key_mask), filled(m, key_mask)
    lengths = 0.5 * k.square().sum(-1)
    if key_mask is not None:
        lengths = lengths.masked_fill(~key_mask[:, None], 0.0)
    high = lengths.amax(-1).detach()[..., None, None]  # cancels in the division
    near = 0.5 * marks.square().sum(-1, keepdim=True)
    power = (spec.scale * (marks @ k.transpose(-1, -2) - near - high)).clamp_max(0.0).exp()
    if key_mask is not None:
        power = power.masked_fill(~key_mask[:, None, None], 0.0)
    sums = power @ torch.nn.functional.pad(v, (0, 1), value=1.0)
    solved = _inverse(spec, options, marks, seen) @ sums
    solved = torch.cat([solved, GUARD * solved[..., -1:].abs()], -1)
    inner = FormSpec(Exact.name, False, spec.scale)
    out = times_values(Exact().weights(inner, {}, *_sides(q, marks), seen), solved)
    below = out[..., -2:].amax(-1, keepdim=True).clamp_min(LEAST)
    return (out[..., :-2] / below).to(dtype)


def _inverse(
    spec: FormSpec, options: SoftConfig, marks: torch.Tensor, seen: torch.Tensor | None
) -> torch.Tensor:
    """(K(l, l) + ridge I)^-1 [B, G, m, m]; landmarks that are not `seen` are apart."""
    half = 0.5 * marks.square().sum(-1)
    apart = marks @ marks.transpose(-1, -2) - half[..., :, None] - half[..., None, :]
    p, one = (spec.scale * apart).exp(), torch.eye(marks.shape[2]).to(marks)
    if seen is None:
        p = p + options.ridge * one
    else:
        both = (seen[:, :, None] & seen[:, None])[:, None]
        own = marks.new_full(seen.shape, options.ridge).masked_fill(~seen, 1.0)
        p = p.masked_fill(~both, 0.0) + own[:, None, :, None] * one
    root = p.sum(-1).rsqrt()
    p = p * root[..., :, None] * root[..., None, :]
    v = one.expand_as(p)
    for _ in range(options.steps):
        v = v @ (2 * one - p @ v)
    return v * root[..., :, None] * root[..., None, :]


def solve_ops(steps: int, m: int, site: AttentionSite) -> OpCount:
    """The landmarks' system and its solution, B*G times, W = E + 1.

    system      mul m*(D + 1) and add m*D of lengths; mul m*m*(D + 1), add m*m*(D + 2), exp m*m
                (with a mask select m*m + m); add m + m*m, sqrt and div m; mul 2 m*m
    each step   mul and add 2 m*m*m, add m*m
    solution    mul m*W twice, mul and add m*m*W; abs and mul m
    """
    b, _, g, _, _, d, e = sizes(site)
    square, w, size, masked = m * m, e + 1, item_bytes(site), site.mask.padding
    one = OpCount.of(
        count_dtype(site),
        mul=m * (d + 1) + square * (d + 3 + w) + 2 * steps * square * m + 2 * m * w + m,
        add=m * (d + 1) + square * (d + 3 + w) + steps * square * (2 * m + 1),
        exp=square,
        select=square + m if masked else 0,
        sqrt=m,
        div=m,
        abs=m,
    )
    moved = OpCount.of(
        read=b * g * m * (d + w) * size + (b * m if masked else 0),
        written=b * g * m * (w + 1) * size,
    )
    return one * (b * g) + moved
