"""A zoo of hand-written attentions, each a function of q, k, v [B, T, H, D] and the input mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.site import Mask

B, T, H, D = 2, 6, 4, 8
SCALE = D**-0.5
LOW = torch.finfo(torch.float32).min


class Attention(nn.Module):
    """Projections around `spelling`; `groups` key/value heads; the output is [B, T, H * D]."""

    def __init__(self, spelling: Callable[..., Tensor], groups: int = H, **consts: Tensor) -> None:
        super().__init__()
        self.spelling, self.groups = spelling, groups
        self.query = nn.Linear(H * D, H * D)
        self.key = nn.Linear(H * D, groups * D)
        self.value = nn.Linear(H * D, groups * D)
        for name, value in consts.items():
            if isinstance(value, nn.Parameter):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)
        self.names = list(consts)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.query(x).view(b, t, H, D)
        k = self.key(x).view(b, t, self.groups, D)
        v = self.value(x).view(b, t, self.groups, D)
        out = self.spelling(q, k, v, mask, *(getattr(self, n) for n in self.names))
        return out.reshape(b, t, H * D)


@dataclass(frozen=True)
class Case:
    """One spelling and the facts it must be found with."""

    name: str
    spelling: Callable[..., Tensor]
    mask: Mask = field(default_factory=Mask)
    groups: int = H
    scale: float = SCALE
    heads: int = H
    consts: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        return Attention(self.spelling, self.groups, **self.consts).eval()


CASES: list[Case] = []


def case(name: str, **facts: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def add(spelling: Callable[..., Tensor]) -> Callable[..., Tensor]:
        CASES.append(Case(name, spelling, **facts))
        return spelling

    return add


def heads(*xs: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in xs]


def back(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


PADDING, CAUSAL = Mask(padding=True), Mask(causal=True)


@case("scale div")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back(torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(D), -1) @ v)


@case("scale mul on scores")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back(F.softmax(torch.matmul(q, k.transpose(2, 3)) * SCALE, dim=-1).matmul(v))


@case("scale by a constant tensor")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    root = torch.sqrt(torch.tensor(float(D)))
    return back(F.softmax(torch.matmul(q, k.transpose(2, 3)) / root, dim=-1).matmul(v))


@case("scale on q before the heads")
def _(q, k, v, mask):
    q, k, v = heads(q * SCALE, k, v)
    return back((q @ k.mT).softmax(-1) @ v)


@case("scale on k after the heads")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back((q @ (k / math.sqrt(D)).transpose(-1, -2)).softmax(-1) @ v)


@case("scale on both")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    root = D**-0.25
    return back(((q * root) @ (k * root).transpose(-1, -2)).softmax(-1) @ v)


@case("no scale", scale=1.0)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back((q @ k.transpose(-1, -2)).softmax(-1) @ v)


@case("additive padding", mask=PADDING)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    extended = (1.0 - mask[:, None, None, :].float()) * LOW
    return back((q @ k.transpose(-1, -2) * SCALE + extended).softmax(-1) @ v)


@case("additive padding before the scale", mask=PADDING)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    extended = (1.0 - mask[:, None, None, :].float()) * -1e9
    return back(((extended + q @ k.transpose(-1, -2)) * SCALE).softmax(-1) @ v)


@case("masked_fill padding", mask=PADDING)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    hidden = (mask == 0).view(q.shape[0], 1, 1, -1).expand_as(scores)
    return back(scores.masked_fill(hidden, LOW).softmax(-1) @ v)


@case("masked_fill in place with -inf", mask=PADDING)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    scores.masked_fill_(mask[:, None, None, :] == 0, float("-inf"))
    return back(scores.softmax(-1) @ v)


@case("where padding", mask=PADDING)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    low = torch.full([], LOW, dtype=scores.dtype)
    return back(torch.where(mask[:, None, None, :].bool(), scores, low).softmax(-1) @ v)


@case("where with the logits second", mask=PADDING)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    return back(torch.where(mask[:, None, None, :] == 0, -1e9, scores).softmax(-1) @ v)


@case("tril", mask=CAUSAL)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    scores = q @ k.transpose(-1, -2) * SCALE
    seen = torch.tril(torch.ones(q.shape[2], k.shape[2]))
    return back(scores.masked_fill(seen == 0, float("-inf")).softmax(-1) @ v)


@case("triu of -inf added", mask=CAUSAL)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    hidden = torch.triu(torch.full((q.shape[2], k.shape[2]), float("-inf")), diagonal=1)
    return back((q @ k.transpose(-1, -2) * SCALE + hidden).softmax(-1) @ v)


@case(
    "causal buffer slice",
    mask=CAUSAL,
    consts={"buffer": torch.tril(torch.ones(16, 16, dtype=torch.bool)).view(1, 1, 16, 16)},
)
def _(q, k, v, mask, buffer):
    q, k, v = heads(q, k, v)
    scores = q @ k.transpose(-1, -2) * SCALE
    t, s = q.shape[2], k.shape[2]
    low = torch.full([], LOW, dtype=scores.dtype)
    return back(torch.where(buffer[:, :, s - t : s, :s], scores, low).softmax(-1) @ v)


@case("causal and padding in two terms", mask=Mask(causal=True, padding=True))
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    scores = q @ k.transpose(-1, -2) * SCALE
    seen = torch.tril(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))
    scores = scores.masked_fill(~seen, -1e9) + (1.0 - mask[:, None, None, :].float()) * -1e9
    return back(scores.softmax(-1) @ v)


@case("sliding window", mask=Mask(window=(2, 1)))
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    seen = (i - j <= 2) & (j - i <= 1)
    return back((q @ k.mT * SCALE).masked_fill(~seen, LOW).softmax(-1) @ v)


@case("causal sliding window", mask=Mask(causal=True, window=(3, 0)))
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    seen = (j <= i) & (i - j < 4)
    return back((q @ k.mT * SCALE).masked_fill(~seen, LOW).softmax(-1) @ v)


@case("block diagonal is a bias", mask=Mask(bias=True))
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    i, j = torch.arange(q.shape[2])[:, None] // 2, torch.arange(k.shape[2]) // 2
    return back((q @ k.mT * SCALE).masked_fill(i != j, LOW).softmax(-1) @ v)


@case("trained bias (T5)", mask=Mask(bias=True), consts={"table": nn.Parameter(torch.randn(9, H))})
def _(q, k, v, mask, table):
    q, k, v = heads(q, k, v)
    far = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    bias = F.embedding(far.clamp(-4, 4) + 4, table).permute(2, 0, 1).unsqueeze(0)
    bias = bias + (1.0 - mask[:, None, None, :].float()) * LOW
    return back((q @ k.transpose(3, 2) * SCALE + bias).float().softmax(-1).type_as(q) @ v)


@case("ALiBi is a bias", mask=Mask(bias=True))
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, H, 1, 1)
    bias = slopes * torch.arange(k.shape[2]).view(1, 1, 1, -1).float()
    return back((q @ k.mT * SCALE + bias).softmax(-1) @ v)


@case("bmm on folded heads")
def _(q, k, v, mask):
    b = q.shape[0]
    q, k, v = (x.transpose(1, 2).reshape(b * H, -1, D) for x in (q, k, v))
    out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(SCALE).softmax(-1), v)
    return back(out.view(b, H, -1, D))


@case("baddbmm with padding", mask=PADDING)
def _(q, k, v, mask):
    b, t = q.shape[:2]
    q, k, v = (x.transpose(1, 2).reshape(b * H, -1, D) for x in (q, k, v))
    hidden = (1.0 - mask[:, None, None, :].float()) * LOW
    hidden = hidden.expand(b, H, t, t).reshape(b * H, t, t)
    scores = torch.baddbmm(hidden, q, k.transpose(1, 2), beta=1, alpha=SCALE)
    return back(torch.bmm(scores.softmax(-1), v).view(b, H, -1, D))


@case("baddbmm with an empty input")
def _(q, k, v, mask):
    b, t = q.shape[:2]
    q, k, v = (x.transpose(1, 2).reshape(b * H, -1, D) for x in (q, k, v))
    empty = torch.empty(b * H, t, t)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return back(torch.bmm(scores.softmax(-1), v).view(b, H, -1, D))


@case("folded logits unfolded for the mask", mask=PADDING)
def _(q, k, v, mask):
    b, t = q.shape[:2]
    q, k, v = (x.transpose(1, 2).reshape(b * H, -1, D) for x in (q, k, v))
    scores = torch.bmm(q * SCALE, k.transpose(1, 2)).view(b, H, t, t)
    scores = scores + (1.0 - mask[:, None, None, :].float()) * LOW
    probs = scores.view(b * H, t, t).softmax(-1)
    return back(torch.bmm(probs, v).view(b, H, t, D))


@case("einsum")
def _(q, k, v, mask):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@case("einsum with an ellipsis")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    scores = torch.einsum("...qd,...kd->...qk", q, k) * SCALE
    return back(torch.einsum("...qk,...kd->...qd", scores.softmax(-1), v))


@case("einsum with keys before queries")
def _(q, k, v, mask):
    scores = torch.einsum("bkhd,bqhd->bhkq", k, q) * SCALE
    return torch.einsum("bhkq,bkhd->bqhd", scores.softmax(2), v)


@case("einsum in groups", groups=2)
def _(q, k, v, mask):
    b, t = q.shape[:2]
    q = q.view(b, t, 2, H // 2, D).permute(0, 2, 3, 1, 4)
    k, v = heads(k, v)
    scores = torch.einsum("bgrtd,bgsd->bgrts", q, k) * SCALE
    out = torch.einsum("bgrts,bgsd->bgrtd", scores.softmax(-1), v)
    return back(out.reshape(b, H, t, D))


@case("repeat_interleave", groups=2)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    k, v = (x.repeat_interleave(H // 2, dim=1) for x in (k, v))
    return back((q @ k.mT * SCALE).softmax(-1) @ v)


@case("expand and reshape", groups=2)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    b, g, s, d = k.shape
    k, v = (x[:, :, None, :, :].expand(b, g, H // g, s, d).reshape(b, H, s, d) for x in (k, v))
    return back((q @ k.transpose(2, 3) * SCALE).softmax(-1) @ v)


@case("one key head", groups=1)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back((q @ k.mT * SCALE).softmax(-1) @ v)


@case("softmax in float32", mask=CAUSAL)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    seen = torch.tril(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))
    scores = (q @ k.mT * SCALE).masked_fill(~seen, LOW)
    probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return back(F.dropout(probs, 0.1, training=False) @ v)


@case("sdpa with a mask", mask=PADDING)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back(F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :].bool()))


@case("sdpa is_causal", mask=CAUSAL)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE))


@case("sdpa enable_gqa", groups=2)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


@case("sdpa on repeated heads", groups=2)
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    k, v = (x.repeat_interleave(H // 2, dim=1) for x in (k, v))
    return back(F.scaled_dot_product_attention(q, k, v))


@case("sdpa on folded heads", heads=1)
def _(q, k, v, mask):
    b = q.shape[0]
    q, k, v = (x.transpose(1, 2).reshape(b * H, -1, D) for x in (q, k, v))
    return back(F.scaled_dot_product_attention(q, k, v).view(b, H, -1, D))


@case("query is also the key")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back((q @ q.transpose(-1, -2) * SCALE).softmax(-1) @ v + q)


@case("values masked before", mask=Mask())
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    v = v * mask[:, None, :, None].float()
    return back((q @ k.transpose(-1, -2) * SCALE).softmax(-1) @ v)
