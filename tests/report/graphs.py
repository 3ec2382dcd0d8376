"""A traced attention block whose SDPA node carries its site, as canonicalise leaves it."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional as F

from passes.site import AttentionSite


class Block(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, dim = heads, heads * width
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.out, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        q, k, v = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


def traced_attention(site: AttentionSite, tokens: int = 8) -> fx.GraphModule:
    block = Block(site.dims.H, site.dims.D).eval()
    program = torch.export.export(block, (torch.randn(1, tokens, site.dims.H * site.dims.D),))
    module: fx.GraphModule = program.module()
    for node in module.graph.nodes:
        if "scaled_dot_product_attention" in str(node.target):
            node.meta["attention_site"] = site
    return module
