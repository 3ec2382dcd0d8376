"""Small models that call SDPA, traced and labelled by hand: canonical graphs for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.site import AttentionSite, Dims, Mask
from passes.trace import trace
from passes.traced import Traced

SDPA = torch.ops.aten.scaled_dot_product_attention.default
NO_MASK = Mask()


class Attention(nn.Module):
    """Self or cross attention with `groups` key/value heads."""

    def __init__(
        self,
        width: int = 16,
        heads: int = 4,
        groups: int = 4,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.causal, self.dropout = heads, groups, causal, dropout
        self.d = width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, groups * self.d)
        self.v = nn.Linear(width, groups * self.d)
        self.o = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None
    ) -> Tensor:
        memory = x if memory is None else memory
        q = self.q(x).unflatten(-1, (self.heads, self.d)).transpose(1, 2)
        k = self.k(memory).unflatten(-1, (self.groups, self.d)).transpose(1, 2)
        v = self.v(memory).unflatten(-1, (self.groups, self.d)).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal,
            enable_gqa=self.groups != self.heads,
        )
        return self.o(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = Attention(**options)
        self.norm = nn.LayerNorm(self.attention.o.out_features)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(x + self.drop(self.attention(x, mask)))


class Encoder(nn.Module):
    """Two layers with tied query weights; `mask` [B, S] bool hides padded keys."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(**options) for _ in range(2)])
        self.layers[1].attention.q.weight = self.layers[0].attention.q.weight

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        wide = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, wide)
        return x


def label(
    traced: Traced, masks: Mask | Sequence[Mask], dropout: float = 0.0
) -> list[AttentionSite]:
    """Put a site on every SDPA node, as find would."""
    nodes = [n for n in traced.module.graph.nodes if n.target is SDPA]
    facts = [masks] * len(nodes) if isinstance(masks, Mask) else list(masks)
    sites = []
    for node, mask in zip(nodes, facts, strict=True):
        q, k, v = (node.args[i].meta["val"] for i in range(3))
        batch, heads, queries, d = q.shape
        size = [n if isinstance(n, int) else str(n) for n in (batch, queries, k.shape[2])]
        dims = Dims(size[0], heads, k.shape[1], size[1], size[2], d, v.shape[-1])
        stack = node.meta.get("nn_module_stack") or {"": ("model", "")}
        path = list(stack.values())[-1][0]
        site = AttentionSite(
            id=f"{path}#0",
            node=node.name,
            dims=dims,
            dtype=str(q.dtype).removeprefix("torch."),
            scale=node.kwargs.get("scale") or d**-0.5,
            mask=mask,
            cross=False,
            dropout=dropout,
        )
        node.meta["attention_site"] = site
        sites.append(site)
    return sites


def canonical(
    model: nn.Module,
    inputs: tuple[Any, ...] | dict[str, Any],
    masks: Mask | Sequence[Mask] = NO_MASK,
    *,
    dropout: float = 0.0,
    dynamic_shapes: Any = None,
) -> tuple[Traced, list[AttentionSite]]:
    """A canonical graph and its sites."""
    traced = trace(model, inputs, dynamic_shapes=dynamic_shapes)
    return traced, label(traced, masks, dropout)


def site(
    *,
    B: int = 2,
    H: int = 4,
    G: int | None = None,
    T: int = 7,
    S: int | None = None,
    D: int = 8,
    E: int | None = None,
    dtype: str = "float32",
    scale: float | None = None,
    **mask: Any,
) -> AttentionSite:
    """A site without a graph."""
    dims = Dims(B, H, G or H, T, S or T, D, E or D)
    facts = Mask(**mask)
    return AttentionSite("block.0.attention#0", "sdpa", dims, dtype, scale or D**-0.5, facts)
