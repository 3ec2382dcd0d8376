"""Quadratic attention over binary codes: a weight for every count of bits, by a table.

With codes of b bits the pair (i, j) has a count n in 0..b: the Hamming distance of the two codes
(the bits of their exclusive or), or the bits that both have set (of their and). Its weight is
``w[h, n] = exp(t[h, n] - max t[h])``, not below e^-60, and the output is ``sum_j w v_j / sum_j w``
over the keys a query sees; a query that sees none gives 0. The table t [H, b + 1] is fitted to
softmax attention by maximum likelihood: for each query the weights on all keys of one count are
summed, so that only (rows, b + 1) numbers are needed, and the problem is convex.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from passes.errors import FitError
from passes.form import FormSpec
from passes.forms import _hash
from passes.forms._hash_learn import Sample
from passes.forms._linear import count_dtype, item_bytes, sizes, visible
from passes.opcount import OpCount
from passes.site import AttentionSite

LOWEST = -60.0  # the least logarithm of a weight, the largest being 0
TINY = 1e-30  # below every sum with a key in it
SAMPLES, QUERIES = 12, 128  # of the calibration data that a table is fitted to, at most
_STEPS, _RIDGE = 30, 1e-3

Count = Callable[[Tensor, Tensor], Tensor]  # (q, k) -> counts [B, H, T, S] as floats


def by_distance(sq: Tensor, sk: Tensor) -> Tensor:
    """Hamming distances [B, H, T, S] of codes -1 and 1, sq [B, H, T, b], sk [B, G, S, b]."""
    return (sq.shape[-1] - _inner(sq, sk)) / 2


def by_common(cq: Tensor, ck: Tensor) -> Tensor:
    """How many bits both codes have set, [B, H, T, S], of codes 0 and 1."""
    return _inner(cq, ck)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    batch, heads, rows, width = a.shape
    grouped = a.reshape(batch, b.shape[1], -1, width) @ b.mT
    return grouped.reshape(batch, heads, rows, -1)


def straight_table(heads: int, bits: int, first: float, step: float) -> Tensor:
    """The table [H, b + 1] whose row is first + step * n: an exponential of the count."""
    return (first + step * torch.arange(bits + 1.0)).repeat(heads, 1)


def looked_up(table: Tensor, count: Tensor) -> Tensor:
    """Weights [B, H, T, S] of counts (whole numbers); count's gradient is that of a straight line
    through the table's neighbours."""
    low = table - table.amax(-1, keepdim=True)
    weights = low.clamp_min(LOWEST).to(count.dtype).exp()
    shape = (*count.shape[:3], weights.shape[-1])
    at = count.detach().round().long()
    found = weights[None, :, None].expand(shape).gather(-1, at)
    if not count.requires_grad:
        return found
    ends = torch.cat([weights[:, :1], weights, weights[:, -1:]], -1).detach()
    slope = (ends[:, 2:] - ends[:, :-2]) / 2
    return found + slope[None, :, None].expand(shape).gather(-1, at) * (count - count.detach())


def attention_weights(
    table: Tensor, count: Tensor, spec: FormSpec, key_mask: Tensor | None
) -> Tensor:
    """Normalised weights [B, H, T, S]; rows that see no key are 0."""
    weights = looked_up(table, count)
    seen = visible(spec, count.shape[-2], count.shape[-1], count.device)
    if seen is not None:
        weights = weights.masked_fill(~seen, 0.0)
    if key_mask is not None:
        weights = weights.masked_fill(~key_mask[:, None, None, :], 0.0)
    return weights / weights.sum(-1, keepdim=True).clamp_min(TINY)


def weighted(weights: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """weights [B, H, T, S] times v [B, G, S, E] -> [B, H, T, E]; hidden values are not read."""
    if key_mask is not None:
        v = v.masked_fill(~key_mask[:, None, :, None], 0.0)
    batch, heads, rows, keys = weights.shape
    grouped = weights.reshape(batch, v.shape[1], -1, keys) @ v
    return grouped.reshape(batch, heads, rows, -1)


@torch.no_grad()
def fit_table(
    site: AttentionSite, spec: FormSpec, start: Tensor, samples: Sequence[Sample], count: Count
) -> Tensor:
    """The table [H, b + 1] under which softmax attention on `samples` is most likely.

    `start` is the table so far, towards which counts that are rarely met are held.

    Raises:
        FitError: no query sees a key, or values that are not finite.
    """
    some = samples[:: max(1, len(samples) // SAMPLES)][:SAMPLES]
    entries = start.shape[-1]
    rows = [_rows(site.scale, spec, sample, count, entries) for sample in some]
    keys, mass = (torch.cat(part, 1) for part in zip(*rows, strict=True))
    used = mass.sum(-1) > 0
    if not bool(used.any()) or not bool(mass.isfinite().all()):
        raise FitError("table: the calibration data has no query that sees a key, or is not finite")
    begin = start.double() - start.double().amax(-1, keepdim=True)
    return _newton(begin, keys, mass).float()


def _rows(
    scale: float, spec: FormSpec, sample: Sample, count: Count, entries: int
) -> tuple[Tensor, Tensor]:
    """For each head and query: keys of each count, and softmax's weight on them, [H, rows, b+1]."""
    q, k, key_mask = sample
    seen = visible(spec, q.shape[2], k.shape[2], q.device)
    every = max(1, -(-q.shape[0] * q.shape[2] // QUERIES))
    logits = _inner(q.float(), k.float()) * scale
    hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bool) if seen is None else ~seen[None, None]
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None, None, :]
    hidden = hidden.expand(logits.shape)
    soft = logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
    at = count(q.float(), k.float()).round().long()
    flat = [
        x.transpose(0, 1).flatten(1, 2)[:, ::every] for x in (at, soft.double(), (~hidden).double())
    ]
    zero = flat[1].new_zeros(*flat[1].shape[:2], entries)
    return zero.scatter_add(-1, flat[0], flat[2]), zero.scatter_add(-1, flat[0], flat[1])


def _newton(start: Tensor, keys: Tensor, mass: Tensor) -> Tensor:
    """argmax of sum mass * log(model) by damped Newton steps, per head, with a small ridge."""
    table, ridge = start.clone(), _RIDGE * mass.sum((1, 2))[:, None]

    def score(t: Tensor) -> Tensor:
        total = (keys * t.exp()[:, None]).sum(-1).clamp_min(TINY).log()
        inside = (mass * t[:, None]).sum((1, 2)) - (mass.sum(-1) * total).sum(-1)
        return inside - (ridge * (t - start).square()).sum(-1) / 2

    best = score(table)
    for _ in range(_STEPS):
        model = keys * table.exp()[:, None]
        model = model / model.sum(-1, keepdim=True).clamp_min(TINY) * mass.sum(-1, keepdim=True)
        slope = (mass - model).sum(1) - ridge * (table - start)
        share = model / mass.sum(-1, keepdim=True).clamp_min(TINY)
        curve = torch.diag_embed(model.sum(1) + ridge) - model.mT @ share
        step = torch.linalg.solve(curve, slope[..., None])[..., 0].clamp(-4.0, 4.0)
        size = 1.0
        while size > 1e-3:
            tried = table + size * step
            now = score(tried)
            better = now > best
            table = torch.where(better[:, None], tried, table)
            best = torch.where(better, now, best)
            step = torch.where(better[:, None], 0.0, step)
            size /= 2
    return table - table.amax(-1, keepdim=True)


def table_ops(site: AttentionSite, bits: int, *, common: bool = False) -> OpCount:
    """The sums over packed codes by a table; W words a code, pairs = B*H*T*S.

    table          max 2*H*(b+1), add and exp H*(b+1)
    counts         uint32 xor (none with `common`: and is free) and popcount W a pair, add W where
                   W > 1
    mask           select for each pair (padding, causal)
    sums           add E + 1, mul E for each pair
    output         max queries, div queries*E
    """
    b_, h, g, t, s, _, e = sizes(site)
    pairs, queries, entries = b_ * h * t * s, b_ * h * t, h * (bits + 1)
    words, item = _hash.words(bits), item_bytes(site)
    masked = site.mask.padding or site.mask.causal
    counted = OpCount.of(
        "uint32",
        xor=pairs * words * (not common),
        popcount=pairs * words,
        add=pairs * words * (words > 1),
    )
    return counted + OpCount.of(
        count_dtype(site),
        exp=entries,
        mul=pairs * e,
        add=pairs * (e + 1) + entries,
        max=2 * entries + queries,
        select=pairs * masked,
        div=queries * e,
        read=(b_ * h * t + b_ * g * s) * 4 * words
        + b_ * g * s * e * item
        + 4 * entries
        + b_ * s * site.mask.padding,
        written=queries * e * item,
    )
