"""Find the attentions of a model, put another form in their place, and train it on."""

from __future__ import annotations

import torch
from torch import nn

from rewriter import rewrite


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(d_model=64, nhead=4, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 32, 64)

    result = rewrite(model, (x,), form="elu")
    print(result.report.summary())
    for site in result.found.sites:
        print(site.id, site.dims, site.mask.kind, site.source)

    optimizer = torch.optim.Adam(result.model.parameters(), lr=1e-3)
    target = model(x).detach()
    for _ in range(5):
        loss = nn.functional.mse_loss(result.model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"distance to the original after five steps: {loss.item():.4f}")


if __name__ == "__main__":
    main()
