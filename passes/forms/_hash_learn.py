"""Learning a kernelised hash from the queries and keys of one attention, without labels.

Supervised hashing with kernels (Liu et al. 2012), supervised by the attention itself as in
EcoFormer (Liu et al. 2022): for each query the `top` most similar keys should have its code (+1),
the `top` least similar ones the opposite code (-1), and the codes are fitted one bit at a time to
what the earlier bits left over:

    maximise  y_q^T R_r y_k,   y = tanh(u / 2),   R_1 = b S,   R_{r+1} = R_r - s_q s_k^T.

A bit starts from random numbers, from the leading eigenvector of the relaxed problem (K_q^T R K_k,
normalised), or from both, and the result with true signs that is best is kept. On MiniLM's first
layers random starts gave codes that agree better with held-out labels (0.197 and 0.213 against
0.180 and 0.197 for spectral ones; 0.326 and 0.316 against 0.295 and 0.279 with shared projections):
a bit that takes most leaves less for those after it. Bandwidth, anchors and centres
are fixed here, from all samples, and never change with a batch again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.errors import FitError, UsageError
from passes.forms import _hash

STARTS = ("spectral", "random", "both")
Sample = tuple[Tensor, Tensor, Tensor | None]  # q [B, H, T, D], k [B, G, S, D], key_mask [B, S]


@dataclass(frozen=True)
class Learning:
    """How a hash is learned; the defaults are the paper's where it has them (top, steps)."""

    top: int = 10
    steps: int = 100
    rate: float = 0.05
    start: str = "random"
    tokens: int = 160  # of one sample, at most
    samples: int = 12

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise UsageError(f"start: one of {', '.join(STARTS)}, got {self.start!r}")
        for name in ("top", "tokens", "samples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class _Data:
    """Kernel values of queries and keys [N, G, T, m] and what is left to explain [N, G, T, S]."""

    kq: Tensor
    kk: Tensor
    labels: Tensor


def learn(
    params: Mapping[str, Tensor],
    samples: Sequence[Sample],
    bits: int,
    *,
    shared: bool,
    seed: int = 0,
    warm: bool = False,
    how: Learning | None = None,
) -> dict[str, Tensor]:
    """A hash for the given queries and keys.

    Args:
        params: the hash so far: its sizes, and with `warm` rows that compete with the new ones.
        samples: captured queries and keys with their key masks.
        bits: b.
        shared: the queries are the keys; similarity is then their own cosine.
        seed: of the choice of tokens, anchors and random starts.
        warm: keep anchors, bandwidth and centres, and start from the old rows too (a refresh).
        how: the method's settings.

    Raises:
        FitError: no token can be seen, or values that are not finite.
    """
    how, draw = how or Learning(), torch.Generator().manual_seed(seed)
    groups, _, anchors = params["anchors"].shape
    q, k = pick(samples, groups, how, draw, shared)
    new = {name: p.detach().float().clone() for name, p in params.items()}
    if not warm:
        new |= _kernel(q, k, anchors, draw)
    kq = _centred(q, new)
    kk = kq if shared else _centred(k, new)
    data = _Data(kq, kk, labels(q, k, how.top))
    old = new["mix"].clone() if warm else None
    new["mix"] = _bits(data, bits, how, draw, old)
    return new


def learn_kernel(
    params: Mapping[str, Tensor], samples: Sequence[Sample], *, seed: int = 0
) -> dict[str, Tensor]:
    """Anchors, centre and rate from the given queries and keys; the mixing stays as it is.

    FitError as in `learn`.
    """
    draw = torch.Generator().manual_seed(seed)
    groups, _, anchors = params["anchors"].shape
    q, k = pick(samples, groups, Learning(), draw, shared=False)
    return _kernel(q, k, anchors, draw)


def pick(
    samples: Sequence[Sample], groups: int, how: Learning, draw: torch.Generator, shared: bool
) -> tuple[Tensor, Tensor]:
    """Unit queries [N, G, T', D] and keys [N, G, S', D]: as many tokens of every sample.

    Query heads of one group count as more tokens of it. Tokens hidden by the mask are left out.
    """
    rows: list[tuple[Tensor, Tensor]] = []
    for q, k, mask in samples:
        for i in range(q.shape[0]):
            seen = None if mask is None else mask[i if mask.shape[0] > 1 else 0]
            keys = k[i] if seen is None else k[i][:, seen]
            self_seen = seen is not None and seen.shape[0] == q.shape[2]
            queries = q[i][:, seen] if self_seen and seen is not None else q[i]
            if queries.shape[1] and keys.shape[1]:
                rows.append((queries.reshape(groups, -1, q.shape[-1]), keys))
    if not rows:
        raise FitError("hash: the calibration data has no token that can be seen")
    order = torch.randperm(len(rows), generator=draw)[: how.samples].tolist()
    rows = [rows[i] for i in order]
    sizes = [min(how.tokens, *(r[n].shape[1] for r in rows)) for n in (0, 1)]
    found = []
    for n in (0, 1):
        parts = []
        for row in rows:
            x = row[n].float()
            parts.append(x[:, torch.randperm(x.shape[1], generator=draw)[: sizes[n]]])
        found.append(_hash.unit(torch.stack(parts)))
    if not all(bool(x.isfinite().all()) for x in found):
        raise FitError("hash: the captured queries or keys are not finite")
    return (found[0], found[0]) if shared else (found[0], found[1])


def labels(q: Tensor, k: Tensor, top: int) -> Tensor:
    """[N, G, T, S] in {-1, 0, 1}: the `top` most and least similar keys of each query.

    Where there are fewer than 2 `top` keys each half has as many as fit.
    """
    similar = q @ k.mT
    count = max(1, min(top, similar.shape[-1] // 2))
    marks = torch.zeros_like(similar)
    marks.scatter_(-1, similar.topk(count, -1).indices, 1.0)
    return marks.scatter_(-1, similar.topk(count, -1, largest=False).indices, -1.0)


def agreement(codes_q: Tensor, codes_k: Tensor, marks: Tensor) -> float:
    """Mean of label times inner product / b over labelled pairs: 1 is perfect, 0 chance."""
    inner = codes_q @ codes_k.mT / codes_q.shape[-1]
    return float((inner * marks).sum() / marks.abs().sum().clamp_min(1))


def _kernel(q: Tensor, k: Tensor, anchors: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Anchors from tokens of all samples, the bandwidth and the centres."""
    both = torch.cat([q, k], 2) if k is not q else q
    pool = both.transpose(0, 1).flatten(1, 2)  # [G, N * T, D]
    at = torch.randint(pool.shape[1], (anchors,), generator=draw)
    if pool.shape[1] >= anchors:
        at = torch.randperm(pool.shape[1], generator=draw)[:anchors]
    points = pool[:, at].mT.contiguous()
    sigma = (1 + points.square().sum(1, keepdim=True) - 2 * pool @ points).mean((1, 2))
    rate = 0.5 / sigma.clamp_min(1e-3)
    centre = _hash.rbf(pool[None], points, rate).mean((0, 2))
    return {"anchors": points, "rate": rate, "centre": centre}


def _centred(x: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    return _hash.rbf(x, params["anchors"], params["rate"]) - params["centre"][:, None]


def _bits(
    data: _Data, bits: int, how: Learning, draw: torch.Generator, old: Tensor | None
) -> Tensor:
    """mix [G, m, b], bit by bit."""
    left, rows = bits * data.labels, []
    for r in range(bits):
        starts = _starts(data, left, how, draw)
        if old is not None:
            starts.append(old[..., r])
        tried = [_scaled(data, a) for a in starts]
        tried += [_ascend(data, left, a, bits, how) for a in tried]
        scores = torch.stack([_score(data, left, a) for a in tried])  # [tries, G]
        best = scores.argmax(0)
        row = torch.stack(tried)[best, torch.arange(len(best))]
        rows.append(row)
        sq, sk = (_sign(_u(x, row)) for x in (data.kq, data.kk))
        left = left - sq[..., :, None] * sk[..., None, :]
    return torch.stack(rows, -1)


def _starts(data: _Data, left: Tensor, how: Learning, draw: torch.Generator) -> list[Tensor]:
    groups, m = data.kq.shape[1], data.kq.shape[-1]
    starts = []
    if how.start != "random":
        starts.append(_spectral(data, left))
    if how.start != "spectral":
        starts.append(torch.randn(groups, m, generator=draw))
    return starts


def _spectral(data: _Data, left: Tensor) -> Tensor:
    """Leading generalised eigenvector of K_q^T R K_k (its symmetric part) against K^T K."""
    cross = (data.kq.mT @ left @ data.kk).sum(0)
    cross = (cross + cross.mT) / 2
    gram = (data.kq.mT @ data.kq + data.kk.mT @ data.kk).sum(0)
    ridge = 1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[-1])
    values, vectors = torch.linalg.eigh(gram.double())
    white = vectors * values.clamp_min(1e-12).rsqrt()[:, None, :]
    inner = torch.linalg.eigh(white.mT @ cross.double() @ white)[1][..., -1:]
    row: Tensor = (white @ inner)[..., 0].float()
    return row


def _u(kernel: Tensor, a: Tensor) -> Tensor:
    """Projections [N, G, T] of kernel values [N, G, T, m] by rows a [G, m]."""
    return (kernel @ a[:, :, None])[..., 0]


def _sign(u: Tensor) -> Tensor:
    return torch.where(u > 0, 1.0, -1.0)


def _scaled(data: _Data, a: Tensor) -> Tensor:
    """The row scaled so that projections have a root mean square of one."""
    both = [_u(x, a).square().mean((0, 2)) for x in (data.kq, data.kk)]
    size = ((both[0] + both[1]) / 2).clamp_min(1e-24).sqrt()
    return a / size[:, None]


def _score(data: _Data, left: Tensor, a: Tensor) -> Tensor:
    """y_q^T R y_k with true signs, by head [G]."""
    sq, sk = _sign(_u(data.kq, a)), _sign(_u(data.kk, a))
    return torch.einsum("ngt,ngts,ngs->g", sq, left, sk)


def _ascend(data: _Data, left: Tensor, start: Tensor, bits: int, how: Learning) -> Tensor:
    """Gradient ascent with momentum on the relaxed objective; the rows stay at unit scale."""
    a, speed = start.clone(), torch.zeros_like(start)
    for _ in range(how.steps):
        yq, yk = (torch.tanh(_u(x, a) / 2) for x in (data.kq, data.kk))
        toward_q = torch.einsum("ngts,ngs->ngt", left, yk) * (1 - yq * yq)
        toward_k = torch.einsum("ngts,ngt->ngs", left, yq) * (1 - yk * yk)
        slope = torch.einsum("ngt,ngtm->gm", toward_q, data.kq)
        slope = slope + torch.einsum("ngs,ngsm->gm", toward_k, data.kk)
        step = slope / slope.norm(dim=-1, keepdim=True).clamp_min(1e-20)
        speed = 0.9 * speed + how.rate * a.norm(dim=-1, keepdim=True) * step
        a = _scaled(data, a + speed)
    return a
