"""Factories for bench tests, named as MODEL: ``tests.bench_models:small``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Small(nn.Module):
    """Two inputs of different dtypes, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(11, 16), nn.Linear(16, 16)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        weights = torch.softmax(x @ x.transpose(1, 2) / 4, -1)
        y = self.layer(weights @ x) * scale
        return {"tokens": y, "mean": y.mean(1)}


def small() -> tuple[nn.Module, dict[str, Any]]:
    """The model and its example inputs; the same weights in every process."""
    torch.manual_seed(5)
    model = Small().eval()
    return model, {"ids": torch.randint(0, 11, (2, 7)), "scale": torch.randn(16)}


def broken() -> tuple[nn.Module, dict[str, Any]]:
    """A factory that raises."""
    raise RuntimeError("this factory is broken\nand says so in two lines")
