"""A tiny encoder with padding masks, its rewritten form, and random batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.substitute import Rewritten, substitute
from rewriter.api import find_sites, make_plan

WIDTH, HEADS, VOCAB = 32, 4, 60


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            f(x).view(b, t, HEADS, WIDTH // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.n1(x + self.o(y.transpose(1, 2).reshape(b, t, WIDTH)))
        return self.n2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    def __init__(self, layers: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(layers)])
        if tied:
            self.blocks[1].o = self.blocks[0].o

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids)
        mask = attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            x = block(x, mask)
        return x


def encoder(layers: int = 2, tied: bool = False, seed: int = 0) -> Encoder:
    """Seeded; queries and keys are made large so that attention is far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Encoder(layers, tied).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.q.weight.mul_(2.5)
            block.k.weight.mul_(2.5)
            block.o.weight.mul_(2.0)
    return model


def batches(count: int, seed: int, size: int = 8, tokens: int = 20) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(1, VOCAB, (size, tokens), generator=draw)
        lengths = torch.randint(tokens // 2, tokens + 1, (size, 1), generator=draw)
        mask = (torch.arange(tokens)[None] < lengths).long()
        made.append({"input_ids": ids * mask, "attention_mask": mask})
    return made


def rewritten(
    model: nn.Module | None = None, form: str = "hedgehog", example: Any = None
) -> Rewritten:
    example = example or batches(1, 99)[0]
    traced, found = find_sites(model or encoder(), example)
    return substitute(traced, found.sites, make_plan(found, form=form))
