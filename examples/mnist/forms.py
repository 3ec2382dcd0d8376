"""Every form in the digit ViT: accuracy before a fit, after it (no labels), after fine-tuning.

    python -m examples.mnist.forms                        # every form that has no row yet
    python -m examples.mnist.forms --forms relu --seed 1  # one more seed of one form
    python -m examples.mnist.page                         # docs/mnist.md, from what is recorded

Each row is a file of its own in out/mnist/, so two runs may share the work; `page` gathers them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from examples.mnist.data import accuracy, digits, shifted
from examples.mnist.model import trained
from passes.errors import RewriterError
from passes.form import forms
from rewriter.api import Result, compile, fine_tune, rewrite
from rewriter.energy import KINDS, energy_report
from rewriter.fit import Recipe, fit
from rewriter.outputs import write_text
from rewriter.progress import shown
from rewriter.supervised import Rates

ROWS = Path(__file__).parents[2] / "out" / "mnist"
BATCH = 50
# Steps, not seconds: the table is then the same on every machine.
RECIPE = Recipe(site_steps=40, block_steps=120, end_steps=40)
# With 2e-3 and 1e-3, softmax, relu and hedgehog kept the state they began with.
RATES = Rates(forms=1e-3, weights=2e-4, steps=200)
LIMIT = 7200.0  # far more than any form takes: it must not end a run on a slow machine
CLOSE = 1e-4  # between the model that was tuned and the same one traced for one image


def images(x: Tensor) -> list[dict[str, Tensor]]:
    """Batches without labels."""
    return [{"image": part} for part in x.split(BATCH)]


def labelled(x: Tensor, y: Tensor, copies: int = 4, seed: int = 1) -> list[dict[str, Tensor]]:
    """Shuffled batches of moved copies, with labels."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(copies):
        order = torch.randperm(len(y), generator=draw)
        moved = shifted(x[order], draw)
        made += [
            {"image": a, "label": b}
            for a, b in zip(moved.split(BATCH), y[order].split(BATCH), strict=True)
        ]
    return made


def loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(logits, batch["label"], label_smoothing=0.05)


def one(name: str, seed: int, progress: Any) -> dict[str, Any]:
    """The row of one form; the test digits are only counted, never chosen by."""
    (x, y), held, (test_x, test_y) = digits()
    example = {"image": x[:2]}
    torch.manual_seed(seed)
    try:
        result = rewrite(
            trained(), example, form=name, dynamic_shapes="auto", held_out=images(test_x),
            on_noop="ok" if name == "exact" else "error", name="digit ViT",
        )  # fmt: skip
    except RewriterError as error:
        return {"form": name, "seed": seed, "why": str(error).splitlines()[-1].strip()}
    row: dict[str, Any] = {"form": name, "seed": seed}
    row["before"] = accuracy(result.model, test_x, test_y)
    if name != "exact":
        done = fit(
            result.rewritten, images(x), seconds=LIMIT, held_out=images(test_x), seed=seed,
            recipe=RECIPE, progress=progress,
        )  # fmt: skip
        row["cosine"] = done.fidelity.cosine_mean
    row["fitted"] = accuracy(result.model, test_x, test_y)
    tuned = fine_tune(
        result, labelled(x, y, seed=seed + 1), loss, seconds=LIMIT, seed=seed, progress=progress,
        validation=labelled(*held, copies=1), rates=RATES,
    )  # fmt: skip
    row["tuned"] = accuracy(result.model, test_x, test_y)
    row |= {
        "loss_before": tuned.loss_before,
        "loss": tuned.loss_after,
        "steps": tuned.steps,
        "skipped": tuned.skipped,
    }
    row["validation"] = accuracy(result.model, *held)
    return row | compiled(result, x[:1])


def compiled(result: Result, image: Tensor) -> dict[str, Any]:
    """Operations and energy of one image, size and largest error of the compiled model."""
    with torch.no_grad():
        state = {n: t.detach().clone() for n, t in result.model.state_dict().items()}
        expected = result.model(image)
    fixed = rewrite(trained(), {"image": image}, plan=result.plan, on_noop="ok", name="digit ViT")
    fixed.model.load_state_dict(state, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(fixed.model(image), expected, atol=CLOSE, rtol=CLOSE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit.rwa"
        artifact = compile(fixed, path=path)
        size = path.stat().st_size
        report = dict(artifact.report)
        artifact.close()
    after = energy_report(fixed.traced, result.plan).after
    return {
        "error": report["compiled_max_abs_error"],
        "kilobytes": size // 1000,
        "operations": {kind: after.ops.total(kind) for kind in KINDS},
        "microjoules": after.energy_mj * 1000,
    }


def row_path(name: str, seed: int) -> Path:
    return ROWS / f"{name}-{seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forms", default="", help="names by commas (all)")
    parser.add_argument("--seed", type=int, default=0, help="order of the data, moves of digits")
    given = parser.parse_args()
    names = [n for n in given.forms.split(",") if n] or sorted(forms(), key=lambda n: n != "exact")
    for name in names:
        path = row_path(name, given.seed)
        if path.exists():
            continue
        start = time.process_time()
        with shown(name, Console(stderr=True)) as progress:
            row = one(name, given.seed, progress)
        row["cpu_seconds"] = round(time.process_time() - start)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(row, indent=1) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
