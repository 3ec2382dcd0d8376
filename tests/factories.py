"""Small importable factories: `tests.factories:name` as MODEL, and modules for tracing tests."""

from __future__ import annotations

import torch
from torch import nn


class Attention(nn.Module):
    """One hand-written self attention with `heads` heads over [B, T, width]."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    """Embedding, a padding-masked attention and dropout: two inputs by name."""

    def __init__(self, length: int = 32) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(length, 16)
        self.register_buffer("ids", torch.arange(length)[None])
        self.attention, self.dropout = Attention(), nn.Dropout(0.5)

    def forward(self, input_ids: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        x = self.words(input_ids) + self.places(self.ids[:, : input_ids.shape[1]])
        x = self.dropout(self.attention(x))
        return x if scale is None else x * scale[:, None, None]


class Branches(nn.Module):
    """Data-dependent control flow: no tracer can take it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return self.inner(x)
        return x


class FixedLength(nn.Module):
    """A model that works for one length only: position weights of 8 rows are added."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(8, 16))
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x + self.places)


def attention() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A factory with named inputs."""
    torch.manual_seed(0)
    return Attention().eval(), {"x": torch.randn(2, 8, 16)}


def attention_tuple() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A factory with positional inputs."""
    torch.manual_seed(0)
    return Attention().eval(), (torch.randn(2, 8, 16),)


def block() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A factory with token ids."""
    torch.manual_seed(0)
    return Block().eval(), {"input_ids": torch.randint(0, 50, (2, 8))}


def without_attention() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model without attention."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {"input": torch.randn(2, 8)}


def branches() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model with data-dependent control flow."""
    return Branches(), {"x": torch.randn(2, 4)}


def raises() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A factory that fails."""
    raise RuntimeError("no weights here")


def wrong_return() -> str:
    """A factory that returns neither module nor inputs."""
    return "a string"


NOT_CALLABLE = 3
