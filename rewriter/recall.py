"""Associative recall: what a form's state can hold, trained from scratch (Arora et al. 2023).

A sequence shows `pairs` keys, each followed by its value, and then asks for the keys again in
another order; at every question the model must name the value (multi-query associative recall,
https://arxiv.org/abs/2312.04927). Softmax looks the answer up; a form with a state of fixed size
must have kept it. An average quality can hide that this is lost, so it is measured alone. As in
that paper one model is trained on sequences of all numbers of pairs and tested on each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.errors import FormError, UsageError
from passes.form import Form, form_named
from passes.site import AttentionSite, Dims, Mask
from passes.substitute import AttentionModule
from rewriter.record import read_rows, write_rows

KEYS, VALUES = 128, 64  # words that are keys, and words that are values
SCHEMA = 2
Progress = Callable[..., None]


@dataclass(frozen=True)
class Setup:
    """What is trained: width and heads of the model, steps of Adam, sequences a step, for every
    learning rate and for `seeds` seeds."""

    width: int = 32
    heads: int = 2
    layers: int = 1
    steps: int = 600
    batch: int = 32
    rates: tuple[float, ...] = (1e-2, 5e-3)
    tested: int = 256
    seeds: int = 2

    def __post_init__(self) -> None:
        if not self.rates or not all(0 < rate < 1 for rate in self.rates):
            raise UsageError(f"rates: give learning rates between 0 and 1, got {self.rates}")
        for name in ("width", "heads", "layers", "steps", "batch", "tested", "seeds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise UsageError(f"heads: {self.heads} heads do not divide the width {self.width}")


@dataclass(frozen=True)
class Cell:
    """One test: form, pairs, share of questions answered right on new sequences; `why` it is
    missing (accuracy None) if the form can not stand in a causal model. `seconds` are those of
    the form's one model."""

    form: str
    pairs: int
    accuracy: float | None
    loss: float | None = None
    rate: float = 0.0
    seed: int = 0
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Score:
    """A form at one number of pairs: mean, least and largest accuracy over the seeds, at the rate
    whose mean over all pairs is best."""

    form: str
    pairs: int
    mean: float
    least: float
    largest: float
    rate: float


def questions(pairs: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(words [count, 3 pairs], answers [count, pairs] to the last `pairs` words)."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(-1)[:, :pairs]
    values = KEYS + torch.randint(0, VALUES, (count, pairs), generator=generator)
    shown = torch.stack([keys, values], -1).flatten(1)
    order = torch.rand(count, pairs, generator=generator).argsort(-1)
    return torch.cat([shown, keys.gather(1, order)], 1), values.gather(1, order)


def recall_site(each: int, heads: int, batch: int, tokens: int) -> AttentionSite:
    """The model's attention: heads of `each` channels, causal."""
    dims = Dims(batch, heads, heads, tokens, tokens, each, each)
    return AttentionSite("recall", "recall", dims, "float32", each**-0.5, Mask(causal=True))


class _Layer(nn.Module):
    """A short causal convolution, which tells a value what it follows, and an attention."""

    def __init__(self, setup: Setup, form: Form, tokens: int) -> None:
        super().__init__()
        width, heads = setup.width, setup.heads
        site = recall_site(width // heads, heads, setup.batch, tokens)
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.mix = nn.Conv1d(width, width, 3, groups=width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attention = AttentionModule(site, form)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        normed = self.norm(x).transpose(1, 2)
        mixed = self.mix(F.pad(normed, (2, 0))).transpose(1, 2) + normed.transpose(1, 2)
        split = self.qkv(mixed).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = self.attention(split[0], split[1], split[2])
        done: Tensor = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return done


class RecallModel(nn.Module):
    """Words [B, T] -> logits over the values [B, T, VALUES]; no positions, no MLP."""

    def __init__(self, setup: Setup, form: Form, pairs: int) -> None:
        super().__init__()
        self.words = nn.Embedding(KEYS + VALUES, setup.width)
        self.layers = nn.ModuleList(_Layer(setup, form, 3 * pairs) for _ in range(setup.layers))
        self.norm, self.head = nn.LayerNorm(setup.width), nn.Linear(setup.width, VALUES)

    def forward(self, words: Tensor) -> Tensor:
        """Logits of the value that each word asks for."""
        x = self.words(words)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def train_form(
    name: str,
    pairs: Sequence[int],
    setup: Setup,
    rate: float,
    seed: int,
    progress: Callable[[int], None],
) -> list[Cell]:
    """Train one model on all numbers of pairs by turns; test each on sequences it has not seen."""
    start, numbers = time.monotonic(), sorted(set(pairs))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = RecallModel(setup, form_named(name), numbers[-1])
        except FormError as error:
            return [Cell(name, number, None, why=str(error)) for number in numbers]
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01, fused=True)
    for step in range(setup.steps):
        share = step / setup.steps
        for group in optimiser.param_groups:
            fall = 0.5 + 0.5 * math.cos(math.pi * share)
            group["lr"] = rate * min(1.0, (step + 1) / 50) * fall
        number = numbers[step % len(numbers)]
        words, answers = questions(number, setup.batch, draw)
        loss = F.cross_entropy(model(words)[:, -number:].flatten(0, 1), answers.flatten() - KEYS)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        progress(step + 1)
    tested = [(number, *test(model, number, setup, seed)) for number in numbers]
    took = round(time.monotonic() - start, 2)
    return [Cell(name, n, right, lost, rate, seed, took) for n, right, lost in tested]


@torch.no_grad()
def test(model: nn.Module, pairs: int, setup: Setup, seed: int) -> tuple[float, float]:
    """(share of right answers, mean cross-entropy in nats) on new sequences."""
    draw = torch.Generator().manual_seed(seed + 1_000_003)
    words, answers = questions(pairs, setup.tested, draw)
    logits = torch.cat([model(part)[:, -pairs:] for part in torch.split(words, setup.batch)])
    right = logits.argmax(-1) == answers - KEYS
    lost = F.cross_entropy(logits.flatten(0, 1), answers.flatten() - KEYS)
    return round(float(right.float().mean()), 4), round(float(lost), 4)


def recall(
    forms: Sequence[str],
    pairs: Sequence[int],
    *,
    setup: Setup | None = None,
    record: Path | None = None,
    progress: Progress | None = None,
) -> list[Cell]:
    """Every form at every number of pairs; finished ones are read from `record`.

    Args:
        forms: names; pairs: how many keys a sequence shows, each from 1 to 128.
        record: a JSON file that is written after every form, and gone on from.
        progress: called as progress(stage, done, total).

    Raises:
        UnknownName: no such form. UsageError: pairs out of range, or a record of another setup.
    """
    setup = setup or Setup()
    for name in forms:
        form_named(name)
    bad = [n for n in pairs if not 1 <= n <= KEYS]
    if bad or not pairs or not forms:
        raise UsageError(f"pairs: give numbers from 1 to {KEYS}, and at least one form; got {bad}")
    head = _head(setup, pairs)
    kept = read_rows(record, head, "cells", lambda row: Cell(**row), "recall", "another setup")
    done = {c.form: [k for k in kept if k.form == c.form] for c in kept}
    tell = progress or (lambda *_: None)
    runs = [(rate, seed) for rate in setup.rates for seed in range(setup.seeds)]
    total = len(forms) * len(runs) * setup.steps
    for index, form in enumerate(forms):
        if form in done:
            continue
        done[form] = []
        for turn, (rate, seed) in enumerate(runs):
            before = (index * len(runs) + turn) * setup.steps

            def step(at: int, label: str = form, before: int = before) -> None:
                tell(label, before + at, total)

            done[form] += train_form(form, pairs, setup, rate, seed, step)
            if done[form][0].why:
                break
        cells = [asdict(c) for found in done.values() for c in found]
        write_rows(record, head, "cells", cells)
    return [cell for form in forms for cell in done[form]]


def scores(cells: Sequence[Cell]) -> list[Score]:
    """Every form at every number of pairs, at the form's best rate; refused ones are left out."""
    made = []
    for name in dict.fromkeys(c.form for c in cells if c.accuracy is not None):
        own = [c for c in cells if c.form == name]
        rates = {rate: [_right(c) for c in own if c.rate == rate] for rate in {c.rate for c in own}}
        best = max(rates, key=lambda rate: (sum(rates[rate]) / len(rates[rate]), rate))
        for number in sorted({c.pairs for c in own}):
            found = [_right(c) for c in own if c.pairs == number and c.rate == best]
            mean = sum(found) / len(found)
            made.append(Score(name, number, mean, min(found), max(found), best))
    return made


def _right(cell: Cell) -> float:
    assert cell.accuracy is not None
    return cell.accuracy


def to_json(cells: Sequence[Cell], setup: Setup) -> dict[str, Any]:
    """Plain data."""
    return {**_head(setup, [c.pairs for c in cells]), "cells": [asdict(c) for c in cells]}


def _head(setup: Setup, pairs: Sequence[int]) -> dict[str, Any]:
    return {"schema": SCHEMA, "setup": asdict(setup), "pairs": sorted(set(pairs))}
