"""Forms that are a feature map and linear attention: what they share, and their maps in torch.

A subclass of `FeatureForm` gives the features, their number, the count of making them and the
kernels that make them; the rest is here. Every map has its closed count next to it; the counts
are those of codegen/kernels/maps.py (rules: passes/forms/_linear.py).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from passes.decode_form import LinearStreaming
from passes.form import FormSpec, Params, Verdict
from passes.forms._linear import (
    accumulate_dtype,
    count_dtype,
    item_bytes,
    linear_attention,
    linear_attention_ops,
    linear_verdict,
    linear_weights,
)
from passes.opcount import OpCount
from passes.site import AttentionSite

HIGHEST = 60.0  # exponents above it would overflow in float32 sums over tokens
Pair = tuple[torch.Tensor, torch.Tensor]


class FeatureForm(LinearStreaming):
    """phi(q) (phi(k)^T v) / phi(q) sum(phi(k)). Dropout on weights has no counterpart."""

    family = "kernelised"
    eps: ClassVar[float] = 1e-12

    def applies(self, site: AttentionSite) -> Verdict:
        """Causal and padding masks, cross attention, grouped heads; no bias, window or tensor."""
        return linear_verdict(site, self.name)

    @abstractmethod
    def features(self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor) -> Pair:
        """Features [B, H, T, R] of q and [B, G, S, R] of k, in the type sums are kept in."""

    @abstractmethod
    def width(self, site: AttentionSite) -> int:
        """R, the number of features."""

    @abstractmethod
    def map_ops(self, site: AttentionSite) -> OpCount:
        """Operations of making the features."""

    @abstractmethod
    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> tuple[Any, Any]:
        """`features` through the kit."""

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
        """Linear attention [B, H, T, E]."""
        fq, fk = self.features(spec, params, q, k)
        return linear_attention(fq, fk, v, key_mask=key_mask, causal=spec.causal, eps=self.eps)

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
        fq, fk = self.features(spec, params, q, k)
        return linear_weights(fq, fk, spec, key_mask, self.eps).to(q.dtype)

    def ops(self, site: AttentionSite) -> OpCount:
        """The feature maps, then linear attention."""
        return self.map_ops(site) + linear_attention_ops(site, self.width(site))

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
        """Feature maps, then the sums."""
        fq, fk = self.map_kernels(kit, spec, params, q, k)
        return kit.linear_attention(fq, fk, v, key_mask=key_mask, causal=spec.causal, eps=self.eps)


class WideFeatureForm(FeatureForm):
    """A feature form whose features leave float16's range: 16-bit data is widened around them."""

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
        """Feature maps and sums of float32 values."""
        dtype = kit.dtype(v)
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        return kit.cast(super().kernel(kit, spec, params, q, k, v, key_mask, bias), dtype)


def root(scale: float) -> float:
    """What each of q and k is multiplied by for logits times `scale`."""
    return math.sqrt(abs(scale))


def wide(x: torch.Tensor) -> torch.Tensor:
    """float32 for 16-bit data."""
    return x.to(accumulate_dtype(x.dtype))


def project(x: torch.Tensor, w: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """x [B, H, T, D] times w [W, D, R] times scale; neighbouring heads share a weight."""
    x = wide(x)
    batch, heads, tokens, d = x.shape
    rows = x.reshape(batch, w.shape[0], -1, d) @ w.to(x.dtype)
    return rows.reshape(batch, heads, tokens, -1) * scale


def per_head(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A weight [W, X] as [H, 1, X] for x [B, H, T, X], in x's type."""
    return weight.to(x.dtype).repeat_interleave(x.shape[1] // weight.shape[0], 0)[:, None]


def relu(x: torch.Tensor, floor: float) -> torch.Tensor:
    """max(x, 0) + floor: positive, so that a row of zeros is an even average, not 0 / 0."""
    return wide(x).relu() + floor


def exp_query(y: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    """exp(y + offset - maximum of the row); the factor cancels in the quotient."""
    if offset is not None:
        y = y + per_head(offset, y)
    return (y - y.amax(-1, keepdim=True)).exp()


def exp_key(y: torch.Tensor, x: torch.Tensor, scale: float, floor: float) -> torch.Tensor:
    """exp(min(y - scale |x|^2 / 2, HIGHEST)) + floor.

    For a draw w the exponent w.x - |x|^2 / 2 is at most |w|^2 / 2 whatever x is, so no maximum
    over tokens is needed: nothing leaks from later tokens or other sequences of the batch.
    """
    half = wide(x).square().sum(-1, keepdim=True) * (0.5 * scale)
    return (y - half).clamp(max=HIGHEST).exp() + floor


def polynomial(y: torch.Tensor, *, low: bool, flat: float = 1.0) -> torch.Tensor:
    """[flat, y, pairs] (`low`) or [flat, pairs]: products are flat^2 + t + t^2/2, or without t.

    Pair s d + a is y_a y_{(a + s) mod d}, halved for s = 0 (sqrt(1/2) on either side): each of
    the d (d + 1) / 2 unordered pairs once, in runs that are contiguous in y.
    """
    d = y.shape[-1]
    turned = [y * y.roll(-shift, -1) for shift in range(1, d // 2 + 1)]  # no gather to derive
    pairs = torch.cat([y.square() * math.sqrt(0.5), *turned], -1)[..., : d * (d + 1) // 2]
    first = torch.full_like(y[..., :1], flat)
    return torch.cat([first, y, pairs] if low else [first, pairs], -1)


def polynomial_width(d: int, *, low: bool) -> int:
    """Number of features of `polynomial`."""
    return d * (d + 1) // 2 + (1 + d if low else 1)


def head_norm(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the last axis with gamma, beta [W, X] of the head."""
    x = wide(x)
    apart = x - x.mean(-1, keepdim=True)
    factor = (apart.square().mean(-1, keepdim=True) + eps).rsqrt()
    return apart * factor * per_head(gamma, x) + per_head(beta, x)


# Closed counts. `rows` is batch * heads * tokens.


def count(site: AttentionSite, values: int, read: int | None = None, **ops: int) -> OpCount:
    """Operations of a kernel that writes `values` values and reads as many (or `read`)."""
    size = item_bytes(site)
    taken = values if read is None else read
    return OpCount.of(count_dtype(site), read=taken * size, written=values * size, **ops)


def relu_ops(values: int, site: AttentionSite) -> OpCount:
    """max, add for each value."""
    return count(site, values, max=values, add=values)


def exp_query_ops(rows: int, r: int, site: AttentionSite, offsets: int = 0) -> OpCount:
    """max, add (subtract), exp for each feature; with `offsets` (their number) one more add."""
    n = rows * r
    return count(site, n, n + offsets, max=n, add=n + (n if offsets else 0), exp=n)


def exp_key_ops(rows: int, d: int, r: int, site: AttentionSite) -> OpCount:
    """Square: mul, add rows*d; half: mul rows; subtract, limit, exp, floor for each feature."""
    n = rows * r
    return count(site, n, n + rows * d, mul=rows * (d + 1), add=rows * d + 2 * n, max=n, exp=n)


def polynomial_ops(rows: int, d: int, site: AttentionSite, *, low: bool) -> OpCount:
    """mul d (d + 1) / 2 (pairs) and d (their halves) for each row."""
    values = rows * polynomial_width(d, low=low)
    return count(site, values, rows * d, mul=rows * (d * (d + 1) // 2 + d))


def head_norm_ops(rows: int, d: int, weights: int, site: AttentionSite) -> OpCount:
    """Sum, subtract, square (mul, add), gamma, beta and factor: mul 3, add 4 for each value.

    A row: mean and mean square mul 2, eps add, sqrt, div.
    """
    n = rows * d
    return count(
        site, n, n + 2 * weights * d, mul=3 * n + 2 * rows, add=4 * n + rows, sqrt=rows, div=rows
    )
