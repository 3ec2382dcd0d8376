"""Closed counts of products of R features with factors of relative positions (kernel_rpe).

They are those of codegen/kernels/relative.py and relative_blocks.py, for a bias that all samples of
a batch share. R is the number of features.
"""

from __future__ import annotations

from passes.forms._linear import count_dtype, item_bytes, sizes
from passes.opcount import OpCount
from passes.site import AttentionSite


def pair_ops(site: AttentionSite, r: int) -> OpCount:
    """With P = H*T*S,

    factors    max, add, exp for each of P, add again with a bias, select with causality
    weights    mul and add B*P*(R + E), mul and add B*P, select with a padding mask
    division   max B*H*T, div B*H*T*E
    """
    b, h, g, t, s, _, e = sizes(site)
    size, biased, masked = item_bytes(site), site.mask.bias, site.mask.padding
    one, rows, pairs = h * t * s, b * h * t, b * h * t * s
    factors = OpCount.of(
        count_dtype(site),
        max=one,
        add=one * (1 + int(biased)),
        exp=one,
        select=one if site.mask.causal else 0,
        read=(one if biased else 0) * size,
        written=one * size,
    )
    products = OpCount.of(
        count_dtype(site),
        mul=pairs * (r + e + 1),
        add=pairs * (r + e + 1),
        select=pairs if masked else 0,
        max=rows,
        div=rows * e,
        read=(rows * r + b * g * s * (r + e) + one) * size + (b * s if masked else 0),
        written=rows * e * size,
    )
    return factors + products


def block_ops(site: AttentionSite, r: int, block: int) -> OpCount:
    """In N blocks of C = `block`, with W = E + 1 and 3 C (causal: 2 C) keys near a query,

    table      max, add and exp H*(2 T - 1), select with causality; with a bias add as many and max
               H*T*T, and of visible keys max T*T + T
    sides      max B*H*(T - 1 - C) for each
    values     select B*G*T*W where keys can be hidden
    states     mul and add B*G*N*C*R*W; for each side (N - 2)*B*H*R*W mul and add, once more add for
               later blocks
    weights    mul near*(R + 1), add near*R for each of B*H*T rows
    read       mul and add (near + R)*W; max 1, div E
    """
    b, h, g, t, _, _, e = sizes(site)
    n, w, size = -(-t // block), e + 1, item_bytes(site)
    biased, causal = site.mask.bias, site.mask.causal
    near, rows, wide = (2 if causal else 3) * block, b * h * t, h * (2 * t - 1)
    hiding, ends = biased or site.mask.padding, (n - 2) * b * h * r * w
    table = OpCount.of(
        count_dtype(site),
        max=wide + (h * t * t + t * t + t if biased else 0),
        add=wide * (2 if biased else 1),
        exp=wide,
        select=wide if causal else 0,
        read=(2 * h * t * t if biased else 0) * size,
        written=wide * size + (t if biased else 0),
    )
    states = b * g * n * block * r * w
    return table + OpCount.of(
        count_dtype(site),
        mul=states + ends * (1 if causal else 2) + rows * (near * (r + 1) + (near + r) * w),
        add=states + ends * (1 if causal else 3) + rows * (near * r + (near + r) * w),
        select=b * g * t * w if hiding else 0,
        max=rows + b * h * (t - 1 - block) * (1 if causal else 2),
        div=rows * e,
        read=(rows * r + b * g * t * (r + e) + wide) * size + (b * t if hiding else 0),
        written=rows * e * size,
    )
