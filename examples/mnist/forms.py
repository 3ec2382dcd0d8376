"""Every form in the digit ViT: accuracy before a fit, after it (no labels), after fine-tuning.

    python -m examples.mnist.forms --docs      # writes docs/mnist.md and docs/images/mnist.png

Results are kept in out/mnist/forms.json after every form; a killed run goes on from there.
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
from rewriter import Result, compile, fine_tune, rewrite
from rewriter.energy import energy_report
from rewriter.fine_tune import Rates
from rewriter.fit import Recipe, fit
from rewriter.outputs import write_text
from rewriter.progress import shown

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "out" / "mnist" / "forms.json"
BATCH = 50
# Steps, not seconds: the table is then the same on every machine.
RECIPE = Recipe(site_steps=60, block_steps=300, end_steps=100)
STEPS = 1000
LIMIT = 900.0


def images(x: Tensor) -> list[dict[str, Tensor]]:
    """Batches without labels."""
    return [{"image": part} for part in x.split(BATCH)]


def labelled(x: Tensor, y: Tensor, copies: int = 4) -> list[dict[str, Tensor]]:
    """Shuffled batches of moved copies, with labels."""
    draw = torch.Generator().manual_seed(1)
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


def one(name: str, progress: Any) -> dict[str, Any]:
    """The row of one form."""
    (x, y), (test_x, test_y) = digits()
    model = trained()
    example = {"image": x[:2]}
    try:
        result = rewrite(
            model, example, form=name, dynamic_shapes="auto", held_out=images(test_x),
            on_noop="ok" if name == "exact" else "error", name="digit ViT",
        )  # fmt: skip
    except RewriterError as error:
        return {"form": name, "why": str(error).splitlines()[-1].strip()}
    row: dict[str, Any] = {"form": name, "before": accuracy(result.model, test_x, test_y)}
    if name != "exact":
        done = fit(
            result.rewritten, images(x), seconds=LIMIT, held_out=images(test_x), recipe=RECIPE,
            progress=progress,
        )  # fmt: skip
        row["cosine"] = done.fidelity.cosine_mean
    row["fitted"] = accuracy(result.model, test_x, test_y)
    torch.manual_seed(0)
    data, held = labelled(x[400:], y[400:]), labelled(x[:400], y[:400], copies=1)
    rates = Rates(forms=2e-3, weights=1e-3, steps=STEPS)
    fine_tune(result, data, loss, seconds=LIMIT, validation=held, rates=rates, progress=progress)
    row["tuned"] = accuracy(result.model, test_x, test_y)
    row |= compiled(result, x[:1])
    return row


def compiled(result: Result, image: Tensor) -> dict[str, Any]:
    """Operations and energy of one image, size and largest error of the compiled model."""
    with torch.no_grad():
        params = {n: p.detach().clone() for n, p in result.model.named_parameters()}
    fixed = rewrite(trained(), {"image": image}, plan=result.plan, on_noop="ok", name="digit ViT")
    fixed.model.load_state_dict(params, strict=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit.rwa"
        artifact = compile(fixed, path=path)
        size = path.stat().st_size
        report = dict(artifact.report)
        artifact.close()
    return {
        "error": report["compiled_max_abs_error"],
        "kilobytes": size // 1000,
        "microjoules": energy_report(fixed.traced, result.plan).after.energy_mj * 1000,
    }


def read() -> dict[str, dict[str, Any]]:
    if not RECORD.exists():
        return {}
    return {row["form"]: row for row in json.loads(RECORD.read_text())["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forms", default="", help="names by commas (all)")
    parser.add_argument("--docs", action="store_true", help="write docs/mnist.md and its picture")
    given = parser.parse_args()
    rows = read()
    names = [n for n in given.forms.split(",") if n] or sorted(forms(), key=lambda n: n != "exact")
    for name in names:
        if name in rows:
            continue
        start = time.monotonic()
        with shown(name, Console(stderr=True)) as progress:
            rows[name] = one(name, progress)
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        write_text(RECORD, json.dumps({"rows": list(rows.values())}, indent=1) + "\n")
        print(f"{name}: {rows[name]} ({time.monotonic() - start:.0f} s)", flush=True)
    if given.docs:
        from examples.mnist.page import write

        write(list(rows.values()), RECIPE.block_steps, STEPS)


if __name__ == "__main__":
    main()
