"""Factories for the command line's tests: ``tests.cli_factories:name`` as MODEL."""

from __future__ import annotations

import torch
from torch import nn


def encoder() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Two layers of nn.TransformerEncoder over [1, 24, 32]."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return model, {"src": torch.randn(1, 24, 32)}


def no_attention() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A plain perceptron."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    return model, {"input": torch.randn(2, 8)}


def raises() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A factory that fails."""
    raise RuntimeError("the weights went missing")


class _Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x * 2
        return x - 1


def branches() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Data-dependent control flow."""
    return _Branches(), {"x": torch.randn(3)}
