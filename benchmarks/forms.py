"""``python -m benchmarks.forms``: how faithful each form is in MiniLM, before or after a fit.

Every form takes the place of all attentions of the built-in `minilm`, on held-out English text in
windows of 128 tokens. "output_error" is the relative error of the attention's output, given the
original's own queries, keys and values, a mean over heads, calls and sites; "cosine" is that of the
sentence embeddings of the two models. The record is written after every form, and a form that is in
it is left out, so a killed run goes on; ``--again NAME`` measures one anew. Random forms have their
default seeds. With ``--fit SECONDS`` each form is first fitted for so long (processor time, one
thread) without labels, on text of other documents, and the record is that of fitted forms.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from passes.canonicalise import canonicalise
from passes.errors import RewriterError
from passes.find import find
from passes.form import forms
from passes.plan import plan_by_rules
from passes.rewire import SHARED
from passes.substitute import AttentionModule, Rewritten, substitute
from passes.trace import trace
from rewriter.calibration import passages, split_sentences, text_batches
from rewriter.capture import Call, capture
from rewriter.fidelity import compare, run_outputs
from rewriter.fit import fit
from rewriter.fit_site import measure
from rewriter.form_facts import AFTER, BEFORE
from rewriter.models import load_model
from rewriter.samples import FIT_TEXTS, HELD_OUT_TEXTS

TEXTS, BATCH, TOKENS = 48, 8, 128
BYTES = 1 << 30
SETTINGS = (
    f"MiniLM (all-MiniLM-L6-v2), all 6 sites, {TEXTS} held-out passages of English in windows of "
    f"{TOKENS} tokens, 30 to 110 words each or a paragraph; "
)


def settings(seconds: float) -> str:
    """How a record is measured, in a sentence."""
    if not seconds:
        return SETTINGS + "no parameter fitted"
    return SETTINGS + (
        f"each form fitted for {seconds:g} seconds of one core without labels (`rewriter fit`; "
        "longer fits come closer, docs/fitting.md)"
    )


class Bench:
    """The original model, its inputs, what its attentions saw, and `seconds` of fit for a form."""

    def __init__(self, seconds: float = 0.0) -> None:
        from transformers import AutoTokenizer

        loaded = load_model("minilm", tokens=TOKENS, batch=BATCH)
        tokenizer = AutoTokenizer.from_pretrained(str(loaded.tokenizer_path))
        texts = passages(split_sentences(libraries=False)[1], TEXTS, seed=1)
        self.batches = text_batches(tokenizer, texts, batch=BATCH, tokens=TOKENS, full=True)
        self.seconds = seconds

        def windows(texts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
            return text_batches(tokenizer, texts, batch=BATCH, tokens=TOKENS, full=True)

        mine, other = split_sentences() if seconds else ([], [])
        self.train = windows(passages(mine, FIT_TEXTS)) if seconds else []
        self.aside = windows(passages(other, HELD_OUT_TEXTS, seed=2)) if seconds else []
        self.traced = canonicalise(trace(loaded.model, loaded.example_inputs))
        self.sites = find(self.traced).sites
        original = self.put("exact")
        self.calls = capture(original, self.batches[::2], [s.id for s in self.sites], BYTES)
        self.outputs = run_outputs(original.module, self.batches)

    def put(self, form: str) -> Rewritten:
        """The model with `form` at every site."""
        rules = {s.id: form for s in self.sites}  # by name: "*" would spare some sites
        return substitute(self.traced, self.sites, plan_by_rules(self.sites, rules))

    def row(self, form: str) -> dict[str, Any]:
        """Output error and cosine of a form (after a fit: cosine), or why there are none."""
        verdict = forms()[form]().applies(self.sites[0])
        if not verdict:
            return {"why": f"{verdict.reason}: refused by these sites"}
        made = self.put(form)
        if self.seconds:
            clock = time.process_time
            if form != "exact":
                fit(made, self.train, seconds=self.seconds, held_out=self.aside, clock=clock)
            return {"cosine": self._cosine(made)}
        with torch.no_grad():
            errors = [self._error(made.attention(s.id), self.calls[s.id]) for s in self.sites]
        return {"output_error": round(fmean(errors), 4), "cosine": self._cosine(made)}

    def _cosine(self, made: Rewritten) -> float:
        with torch.no_grad():
            found = compare(self.outputs, run_outputs(made.module, self.batches))
        return round(found.cosine_mean, 4)

    def _error(self, attention: AttentionModule, calls: Sequence[Call]) -> float:
        if SHARED in attention.form.rewires(attention.site):
            calls = [Call(c.q, c.q, c.v, c.key_mask, c.bias, c.out) for c in calls]
        return measure(attention, calls)[0]


def save(path: Path, rows: Mapping[str, Any], how: str) -> None:
    """Write the record beside, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    known = {"settings": how, "forms": dict(sorted(rows.items()))}
    part.write_text(json.dumps(known, indent=1) + "\n")
    os.replace(part, path)


def main(argv: list[str] | None = None) -> int:
    """Measure what the record lacks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forms", description=__doc__)
    parser.add_argument("--again", nargs="*", default=[], metavar="FORM", help="measure these anew")
    parser.add_argument("--fit", type=float, default=0.0, metavar="SECONDS", help="fit each first")
    parser.add_argument("--record", type=Path, help="where to (else in rewriter/records/)")
    told = parser.parse_args(argv)
    told.record = told.record or (AFTER if told.fit else BEFORE)
    torch.set_num_threads(1)
    rows = json.loads(told.record.read_text())["forms"] if told.record.exists() else {}
    rows = {n: row for n, row in rows.items() if n in forms()}
    left = [n for n in forms() if n not in rows or n in told.again]
    print(f"{len(left)} of {len(forms())} forms to measure", flush=True)
    if not left:
        return 0
    bench = Bench(told.fit)
    for name in left:
        try:
            rows[name] = bench.row(name)
        except RewriterError as error:
            rows[name] = {"why": str(error).splitlines()[0]}
        save(told.record, rows, settings(told.fit))
        print(f"{name}: {rows[name]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
