"""Train the ViT on 3,600 digits (a few minutes on two cores) and write vit.safetensors.

python -m examples.mnist.train
"""

from __future__ import annotations

import math

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch.nn import functional as F

from examples.mnist.data import accuracy, digits, shifted
from examples.mnist.model import WEIGHTS, DigitViT
from rewriter.progress import shown

EPOCHS, BATCH, RATE = 66, 100, 2e-3


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    (x, y), _, (test_x, test_y) = digits()
    model = DigitViT()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = EPOCHS * (len(y) // BATCH)
    with shown("train", Console(stderr=True)) as progress:
        for step in range(steps):
            if step % (len(y) // BATCH) == 0:
                order = torch.randperm(len(y), generator=generator)
            part = order[step % (len(y) // BATCH) * BATCH :][:BATCH]
            warm, fall = min(1, (step + 1) / 100), 0.5 + 0.5 * math.cos(math.pi * step / steps)
            for group in optimiser.param_groups:
                group["lr"] = RATE * warm * fall
            logits = model(shifted(x[part], generator))
            loss = F.cross_entropy(logits, y[part], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            progress("train", step + 1, steps)
    model.eval()
    save_file(model.state_dict(), WEIGHTS)
    print(
        f"{accuracy(model, x, y):.4f} on the training digits, "
        f"{accuracy(model, test_x, test_y):.4f} on 1,000 others; wrote {WEIGHTS}"
    )


if __name__ == "__main__":
    main()
