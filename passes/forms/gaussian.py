"""gaussian: weights by the distance of query and key, not their product (Song et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from passes.decode_form import CachedStreaming, StateSpec, Stepped, Tensors
from passes.form import FormSpec, Paper, Params, Verdict
from passes.forms._linear import (
    accumulate_dtype,
    count_dtype,
    dtype_name,
    group_verdict,
    item_bytes,
    sizes,
)
from passes.forms.exact import Exact
from passes.opcount import OpCount
from passes.site import AttentionSite


class Gaussian(CachedStreaming):
    """Weights exp(-scale |q - k|^2 / 2) over their sum, with every mask and bias.

    Equals softmax attention where all keys are equally long, because |q|^2 cancels in a row; of a
    trained softmax it takes each key's weight times exp(-scale |k|^2 / 2), so a model with keys of
    different lengths needs training. (`soft` is the same kernel by landmarks, in linear time.)
    """

    name = "gaussian"
    family = "exact"
    paper = Paper(
        "Song, Han, Zhang, Ding, Hong",
        "Unraveling the Gradient Descent Dynamics of Transformers",
        2024,
        "https://arxiv.org/abs/2411.07538",
    )
    formula = "sum_j w_ij v_j / sum_j w_ij,  w_ij = exp(-scale |q_i - k_j|^2 / 2 + bias_ij)"
    needs = "training"

    def applies(self, site: AttentionSite) -> Verdict:
        """Every mask, cross attention and grouped heads, as exact attention."""
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
    ) -> torch.Tensor:
        """Gaussian attention [B, H, T, E]."""
        left, right = _sides(q, k)
        out = Exact().attend(spec, {}, left, right, v.to(left.dtype), key_mask, bias)
        return out.to(q.dtype)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weights [B, H, T, S]."""
        return Exact().weights(spec, {}, *_sides(q, k), key_mask, bias).to(q.dtype)

    def ops(self, site: AttentionSite) -> OpCount:
        """Half the squared length of each key (mul D + 1, add D), exact attention one wider."""
        b, _, g, _, s, d, _ = sizes(site)
        keys, size = b * g * s, item_bytes(site)
        wider = Exact().ops(replace(site, dims=replace(site.dims, D=d + 1)))
        return wider + OpCount.of(
            count_dtype(site),
            mul=keys * (d + 1),
            add=keys * d,
            read=keys * d * size,
            written=keys * (d + 1) * size,
        )

    def counted(self, site: AttentionSite) -> OpCount:
        """EcoFormer's rule for softmax attention, and the lengths."""
        b, _, g, _, s, d, _ = sizes(site)
        return Exact().counted(site) + OpCount.of(mul=b * g * s * d, add=b * g * s * d)

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
        """Keys with their lengths, then exact attention; float32, because lengths are large."""
        dtype = kit.dtype(q)
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        left, right = kit.with_ones(q), kit.extend(k, -0.5, one=False)
        return kit.cast(Exact().kernel(kit, spec, {}, left, right, v, key_mask, bias), dtype)

    def state(self, site: AttentionSite, length: int) -> tuple[StateSpec, ...]:
        """As exact attention, keys with their lengths and in the type sums are kept in."""
        kind = "float64" if dtype_name(site.dtype) == "float64" else "float32"
        wider = replace(site, dims=replace(site.dims, D=site.dims.D + 1), dtype=kind)
        return super().state(wider, length)

    def step(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        state: Tensors,
        position: torch.Tensor,
    ) -> Stepped:
        """Exact attention's step, keys with their lengths."""
        left, right = _sides(q, k)
        values = v.to(left.dtype)
        out, new = Exact().step(spec, {}, left, right, values, state, position)
        return out.to(q.dtype), new

    def step_kernel(
        self,
        kit: Any,
        spec: FormSpec,
        params: Mapping[str, Any],
        q: Any,
        k: Any,
        v: Any,
        state: Sequence[Any],
        position: Any,
    ) -> tuple[Any, list[Any]]:
        """Keys with their lengths, then exact attention's step; in float32."""
        dtype = kit.dtype(q)
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        left, right = kit.with_ones(q), kit.extend(k, -0.5, one=False)
        out, new = Exact().step_kernel(kit, spec, {}, left, right, v, state, position)
        return kit.cast(out, dtype), new


def _sides(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[q, 1] and [k, -|k|^2 / 2]: their product is that of q and k less half of |k|^2."""
    wide = accumulate_dtype(q.dtype)
    q, k = q.to(wide), k.to(wide)
    left = torch.nn.functional.pad(q, (0, 1), value=1.0)
    return left, torch.cat([k, -0.5 * k.square().sum(-1, keepdim=True)], -1)
