"""Entry: one model of the zoo and the attention sites that reading its code gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Tensor]]


@dataclass(frozen=True)
class Site:
    """What a site must be: id, mask kind, sizes [B, H, G, T, S, D, E], cross, dropout, scale."""

    id: str
    mask: str
    dims: tuple[int, int, int, int, int, int, int]
    cross: bool = False
    dropout: float = 0.0
    scale: float | None = None
    window: tuple[int, int] | None = None


@dataclass(frozen=True)
class Entry:
    """One model in one implementation.

    `make(attn)` gives the model and its inputs. `dynamic` is trace's short form, `resize` the
    sizes of dynamic names to run with afterwards. `near_misses` are pieces of the reasons
    expected, in order. `exact` is False where dropout makes outputs random.
    """

    name: str
    make: Callable[[str], Made]
    sites: tuple[Site, ...]
    attn: tuple[str, ...] = ("sdpa", "eager")
    dynamic: dict[str, dict[int, str]] | None = None
    resize: dict[str, int] = field(default_factory=dict)
    near_misses: tuple[str, ...] = ()
    exact: bool = True


def sites(
    pattern: str, layers: int, mask: str, dims: tuple[int, ...], **facts: Any
) -> tuple[Site, ...]:
    """One Site a layer; `pattern` holds {i}; dims are (B, H, G, T, S, D)."""
    b, h, g, t, s, d = dims
    return tuple(
        Site(pattern.format(i=i) + "#0", mask, (b, h, g, t, s, d, d), **facts)
        for i in range(layers)
    )
