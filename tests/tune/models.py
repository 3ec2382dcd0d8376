"""Small models for tuning tests: their kernels take microseconds and build fast."""

from __future__ import annotations

import torch
from torch import nn


class Two(nn.Module):
    """Two linear layers; `wide` shares no kernel shape with another width."""

    def __init__(self, wide: int = 96, out: int = 48) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, wide), nn.Linear(wide, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def two(wide: int = 96, out: int = 48) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    return Two(wide, out).eval(), (torch.randn(64, 64),)
