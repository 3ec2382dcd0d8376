"""``python -m benchmarks.fitting``: how close forms come to softmax attention, fitted or not.

One row a form on real sentences of at most 128 tokens: cosine and nearest neighbours of sentence
embeddings against the original's, in groups of 96 held-out texts, none from a document that was
fitted on. Rows go to a JSON record as they are made; a killed run goes on, also inside a fit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from passes.form import form_named
from passes.substitute import Rewritten, substitute
from rewriter.api import find_sites, make_plan
from rewriter.calibration import passages, split_sentences, text_batches
from rewriter.fidelity import compare, run_outputs
from rewriter.fit import Recipe, fit
from rewriter.fit_model import teacher_of
from rewriter.fit_precision import has_bfloat16
from rewriter.models import load_model
from rewriter.samples import FIT_TEXTS, HELD_OUT_TEXTS

TOKENS, BATCH = 128, 8
RECORD = Path(__file__).parent / "results" / "fitting.json"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.monotonic, "cpu": time.process_time}
Batches = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Row:
    """A form with its options, fitted or not."""

    form: str
    options: tuple[tuple[str, int], ...] = ()
    fitted: bool = False

    @property
    def name(self) -> str:
        """As in the record."""
        told = ",".join(f"{k}={v}" for k, v in self.options)
        return self.form + (f":{told}" if told else "") + (" fitted" if self.fitted else "")


NARROW = (("window", 16),)  # with 64 all keys of 128 tokens are near, and it is softmax itself
ROWS = (
    Row("hedgehog", fitted=True),
    *(Row(f) for f in ("hedgehog", "lolcats", "topk", "window", "nystrom", "block_summary")),
    Row("lolcats", NARROW),
    Row("lolcats", NARROW, fitted=True),
    *(Row(f) for f in ("elu", "taylor", "favor", "cosformer", "relu")),
)


@dataclass(frozen=True)
class Bench:
    """What all rows share: the model's name, texts to fit on and groups of held-out ones."""

    model: Any
    inputs: dict[str, torch.Tensor]
    fit_on: Batches
    groups: list[Batches]

    def rewritten(self, row: Row) -> Rewritten:
        """The model with the row's form at every site."""
        traced, found = find_sites(self.model, self.inputs, dynamic_shapes="auto")
        form = form_named(row.form, dict(row.options))
        return substitute(traced, found.sites, make_plan(found, form=form))


def prepare(model: str, groups: int) -> Bench:
    """Load the model and make its batches."""
    from transformers import AutoTokenizer

    loaded = load_model(model, tokens=TOKENS)
    tokenizer: Any = AutoTokenizer.from_pretrained(loaded.tokenizer_path)
    names, (train, held) = list(loaded.example_inputs), split_sentences()

    def batches(texts: Sequence[str]) -> Batches:
        return text_batches(tokenizer, texts, names=names, batch=BATCH, tokens=TOKENS)

    aside = [batches(passages(held, HELD_OUT_TEXTS, seed=1 + i)) for i in range(groups)]
    return Bench(loaded.model, loaded.example_inputs, batches(passages(train, FIT_TEXTS)), aside)


def measure(bench: Bench, row: Row, told: argparse.Namespace) -> dict[str, Any]:
    """One row of the record."""
    made = bench.rewritten(row)
    result: dict[str, Any] = {"name": row.name, "form": row.form, "options": dict(row.options)}
    if row.fitted:
        folder = told.record.parent / f".{told.record.stem}-{row.name.replace(' ', '-')}"
        report = fit(
            made, bench.fit_on, seconds=told.seconds, held_out=bench.groups[0], state_dir=folder,
            recipe=Recipe(save_every=30.0), clock=CLOCKS[told.clock], progress=_tell(),
        )  # fmt: skip
        result["fit"] = report.to_json()
        result["conditions"] = {
            "seconds": told.seconds, "clock": told.clock, "threads": torch.get_num_threads(),
            "bfloat16": has_bfloat16(), "texts": FIT_TEXTS,
        }  # fmt: skip
    teacher, found = teacher_of(made), []
    for group in bench.groups:
        pair = run_outputs(teacher.module, group), run_outputs(made.module, group)
        found.append(compare(*pair).to_json())
    result["groups"] = found
    for key in ("cosine_mean", "nn_agreement", "relative_error"):
        result[key] = sum(f[key] for f in found) / len(found)
    return result


def _tell() -> Callable[..., None]:
    """Progress, one line in half a minute."""
    last = [0.0]

    def tell(stage: str, site: str, step: int, total: int, loss: float, left: float) -> None:
        if time.monotonic() - last[0] > 30:
            last[0] = time.monotonic()
            print(f"  {stage} {site} {step}/{total} {loss:.4f}, {left:.0f} s left", flush=True)

    return tell


def _save(path: Path, rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(part, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fitting", description=__doc__)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--seconds", type=float, default=600.0, help="of each fit")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--groups", type=int, default=4, help="of 96 held-out texts")
    parser.add_argument("--only", action="append", help="a row's name; may be repeated")
    parser.add_argument("--record", type=Path, default=RECORD)
    told = parser.parse_args(argv)
    rows = json.loads(told.record.read_text()) if told.record.exists() else {}
    left = [r for r in ROWS if r.name not in rows and (not told.only or r.name in told.only)]
    bench = prepare(told.model, told.groups) if left else None
    for row in left:
        assert bench is not None
        rows[row.name] = measure(bench, row, told)
        _save(told.record, rows)
        print(_line(rows[row.name]), flush=True)
    return 0


def _line(row: dict[str, Any]) -> str:
    return f"{row['name']}: cosine {row['cosine_mean']:.4f}, neighbours {row['nn_agreement']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
