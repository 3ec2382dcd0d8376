"""MiniLM with hashed attention: what a fit without labels and then more sentences recover.

The fit trains towards the original layer by layer and as a whole; the fine-tuning after it knows
the original's outputs alone, on sentences without labels, and learns the hashes again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rewriter.api import apply_plan, find_sites, fine_tune, fit_result, make_plan
from rewriter.calibration import passages, split_sentences, text_batches
from rewriter.fit_loss import floating, model_loss
from rewriter.models import load_model
from rewriter.pipeline import measure_fidelity
from rewriter.samples import samples_for
from rewriter.supervised import Rates

FIT, TUNE, THREADS = 150.0, 60.0, 2  # seconds, seconds, threads
TEXTS, BATCH = 480, 8
HELD = 15  # one batch in so many chooses the best state


def recovered(progress: Any = None) -> dict[str, Any]:
    """Cosines of held-out sentence embeddings with the original's: at first, fitted, tuned."""
    from transformers import AutoTokenizer

    torch.set_num_threads(THREADS)
    loaded = load_model("minilm")
    traced, found = find_sites(loaded.model, loaded.example_inputs, dynamic_shapes="auto")
    fit_on, held_out = samples_for(loaded, None, dynamic=True)
    result = apply_plan(traced, found, make_plan(found, form="hamming"), "MiniLM", held_out)
    fit_result(result, FIT, fit_on, progress=progress)
    assert result.fitted is not None
    tokenizer = AutoTokenizer.from_pretrained(loaded.tokenizer_path)
    texts = passages(split_sentences()[0], TEXTS, seed=2)
    names = list(loaded.example_inputs)
    batches = text_batches(tokenizer, texts, names=names, batch=BATCH, tokens=128, full=False)
    data = [dict(batch) for batch in batches]
    held = data[HELD // 2 :: HELD]  # batches are sorted by length
    train = [b for i, b in enumerate(data) if i % HELD != HELD // 2]
    start = time.process_time()
    done = fine_tune(
        result, train, towards(traced.module), seconds=TUNE, validation=held,
        rates=Rates(forms=2e-4, weights=2e-4), refresh=1, progress=progress,
    )  # fmt: skip
    cpu = time.process_time() - start
    tuned = measure_fidelity(result)
    report = result.fitted
    return {
        "before": report.fidelity_before.cosine_mean, "fitted": report.fidelity.cosine_mean,
        "tuned": tuned.cosine_mean, "fit_seconds": FIT, "tune_seconds": TUNE,
        "threads": THREADS, "tune_steps": done.steps, "texts": len(texts), "epoch": len(train),
        "fit_cpu": report.cpu_seconds, "tune_cpu": cpu,
    }  # fmt: skip


def towards(original: torch.nn.Module) -> Callable[..., Tensor]:
    """The loss of the fit's last stage, without hidden states."""

    def loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = floating(original(**batch))
        return model_loss(floating(outputs), wanted, [], batch)

    return loss
