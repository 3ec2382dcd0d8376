"""A small PVT v2 for 28 x 28 digits: four stages of one block on 256, 64, 16 and 4 tokens."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from examples.mnist.data import digits, shifted

EPOCHS, BATCH, RATE = 50, 100, 2e-3


class DigitPvt(nn.Module):
    """Images [B, 1, 28, 28] in 0..1 -> logits [B, 10]; keys and values are reduced 8, 4, 2, 1."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import PvtV2Config, PvtV2ForImageClassification

        config = PvtV2Config(
            image_size=32, num_channels=1, num_labels=10, hidden_sizes=[16, 32, 48, 64],
            depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], mlp_ratios=[4, 4, 4, 4],
            strides=[2, 2, 2, 2], sr_ratios=[8, 4, 2, 1], drop_path_rate=0.0,
        )  # fmt: skip
        self.net = PvtV2ForImageClassification(config)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.net(F.pad(image, (2, 2, 2, 2))).logits
        return logits


def pretrained(path: Path) -> DigitPvt:
    """The model with the weights in `path`, which are trained and written if they are not there."""
    model = DigitPvt()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    train(model.train())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({n: p.contiguous() for n, p in model.state_dict().items()}, part)
    part.replace(path)
    return model.eval()


def train(model: nn.Module) -> None:
    """AdamW on moved digits, the rate warmed up, then falling as a cosine; in place."""
    generator = torch.Generator().manual_seed(0)
    (x, y), *_ = digits()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    rounds = len(y) // BATCH
    steps = EPOCHS * rounds
    for step in range(steps):
        if step % rounds == 0:
            order = torch.randperm(len(y), generator=generator)
        part = order[step % rounds * BATCH :][:BATCH]
        fall = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * fall
        logits = model(shifted(x[part], generator))
        loss = F.cross_entropy(logits, y[part], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
