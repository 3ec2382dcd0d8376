"""Kernelised hashing: rows of q or k become b signs, the codes of a Hamming space.

For a row x of length one, anchors a_1..a_m and a frozen rate 1 / (2 sigma),

    K_j(x) = exp(-rate |x - a_j|^2),    bit r = sign(sum_j (K_j(x) - centre_j) mix_jr)

with sign(0) = -1 (supervised hashing with kernels, Liu et al. 2012, as used by EcoFormer, Liu et
al. 2022). A row of zeros is treated as if it had length one. Each key head has its own hash; the
query heads of its group use it too. `sigma`, the anchors and the centres are parameters: the output
of a token never depends on the others of its batch.

The gradient of the sign is that of the identity where |u| < 1, else 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.forms._linear import accumulate_dtype
from passes.opcount import OpCount
from passes.site import AttentionSite

NAMES = ("anchors", "centre", "mix", "rate")
TINY = 1e-12
_SAMPLES = 2048  # random unit vectors that give the first centres


class _Sign(torch.autograd.Function):
    """sign with sign(0) = -1 and a straight-through gradient inside the window (low, 1)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, low: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.low = low
        return torch.where(u > 0, 1.0, -1.0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return grads[0] * ((u > ctx.low) & (u < 1)), None


def signs(u: Tensor, low: float = -1.0) -> Tensor:
    """-1 or 1 in u's dtype; the gradient is passed on where low < u < 1."""
    result: Tensor = _Sign.apply(u, low)  # type: ignore[no-untyped-call]
    return result


def initial(groups: int, d: int, anchors: int, bits: int) -> dict[str, Tensor]:
    """A hash that has seen no data: random anchors on the sphere, random mixing; always the same.

    anchors [G, D, m], centre [G, m], mix [G, m, b], rate [G].
    """
    draw = torch.Generator().manual_seed(0)
    units = F.normalize(torch.randn(_SAMPLES, d, generator=draw), dim=-1)
    points = F.normalize(torch.randn(groups, d, anchors, generator=draw), dim=1)
    rate = torch.full((groups,), 0.25)  # sigma, the mean squared distance on the sphere, is 2
    kernel = rbf(units.expand(1, groups, -1, -1), points, rate)
    return {
        "anchors": points,
        "centre": kernel.mean((0, 2)),
        "mix": torch.randn(groups, anchors, bits, generator=draw),
        "rate": rate,
    }


def unit(x: Tensor) -> Tensor:
    """Rows of length one in at least float32; zeros stay zero."""
    x = x.to(accumulate_dtype(x.dtype))
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.clamp_min(TINY)


def rbf(x: Tensor, anchors: Tensor, rate: Tensor) -> Tensor:
    """K [B, G, N, m] of rows x [B, G, N, D] of length one with anchors [G, D, m]."""
    own = 1 + anchors.square().sum(-2, keepdim=True)
    kernel: Tensor = (rate[:, None, None] * (2 * (x @ anchors) - own)).exp()
    return kernel


def projections(x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """u [B, H, N, b], whose signs are the codes, of rows x [B, H, N, D], G heads of hashes."""
    batch, heads, rows, width = x.shape
    groups = params["anchors"].shape[0]
    y = unit(x).reshape(batch, groups, -1, width)
    p = {name: params[name].to(y.dtype) for name in NAMES}
    kernel = rbf(y, p["anchors"], p["rate"]) - p["centre"][:, None]
    return (kernel @ p["mix"]).reshape(batch, heads, rows, -1)


def above(x: Tensor, threshold: Tensor) -> Tensor:
    """u [B, H, N, D] of rows x: channels of the row of length one less their head's threshold.

    threshold [G]; a code bit is set where u > 0.
    """
    level = threshold.to(accumulate_dtype(x.dtype))
    level = level.repeat_interleave(x.shape[1] // len(level))
    return unit(x) - level[:, None, None]


def mean_channels(samples: Sequence[tuple[Tensor, Tensor, Tensor | None]], groups: int) -> Tensor:
    """The mean channel [G] of all normalised queries and keys: the threshold of `above`."""
    rows = [unit(x).transpose(0, 1).reshape(groups, -1) for q, k, _ in samples for x in (q, k)]
    return torch.cat(rows, 1).mean(1)


def words(bits: int) -> int:
    """32-bit words of a packed code."""
    return -(-bits // 32)


def hash_ops(rows: int, groups: int, d: int, m: int, b: int, item: int) -> OpCount:
    """The kernel that hashes `rows` rows of length d with `groups` hashes into packed words.

    length         mul and add rows*d; sqrt, max, div rows (its inverse); mul rows (twice the rate)
    products       mul and add rows*d*m
    exponent       mul and add rows*m, exp rows*m; centre: add rows*m
    bits           mul and add rows*m*b
    words          max (comparison) rows*b'; uint32: select, shift and add rows*b'
    once           mul and add groups*(d*m + m) (lengths of anchors, times rate), add groups
    b' is b, or whole words where a code has several.
    """
    padded = b if b <= 32 else 32 * words(b)
    count = OpCount.of(
        "float32",
        mul=rows * (d + d * m + 1 + m + m * b) + groups * (d * m + m),
        add=rows * (d + d * m + 2 * m + m * b) + groups * (d * m + m + 1),
        exp=rows * m,
        sqrt=rows,
        max=rows + rows * padded,
        div=rows,
        read=rows * d * item + 4 * groups * (d * m + m + m * b + 1),
        written=rows * words(b) * 4,
    )
    many = rows * padded
    return count + OpCount.of("uint32", select=many, shift=many, add=many)


def last_stage(site: AttentionSite, sites: Sequence[AttentionSite]) -> str:
    """Why the last stage of a pyramid keeps its softmax; "" for any other site.

    A pyramid has reduced attention; its last stage is not reduced and has the fewest tokens.
    """
    tokens = [s.dims.T for s in sites if isinstance(s.dims.T, int)]
    pyramid = any(s.reduced for s in sites) and len(tokens) == len(sites)
    if pyramid and not site.reduced and min(tokens) == site.dims.T:
        return "the last stage keeps its softmax, as in the paper"
    return ""


def least_margin(*projected: Tensor) -> float:
    """The smallest |u|."""
    return min((float(u.abs().min()) for u in projected if u.numel()), default=math.inf)
