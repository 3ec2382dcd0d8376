"""Associative recall: what a form's state can hold, trained from scratch (Arora et al. 2023).

A sequence shows `pairs` keys, each followed by its value, and then asks for the keys again in
another order; at every question the model must name the value (multi-query associative recall,
https://arxiv.org/abs/2312.04927). Softmax looks the answer up; a form with a state of fixed size
must have kept it. An average quality can hide that this is lost, so it is measured alone.
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
SCHEMA = 1
Progress = Callable[..., None]


@dataclass(frozen=True)
class Setup:
    """What is trained: width and heads of the model, steps of Adam, sequences a step."""

    width: int = 64
    heads: int = 4
    layers: int = 1
    steps: int = 400
    batch: int = 32
    rate: float = 1e-2
    tested: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "heads", "layers", "steps", "batch", "tested"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise UsageError(f"heads: {self.heads} heads do not divide the width {self.width}")


@dataclass(frozen=True)
class Cell:
    """One model: form, pairs, share of questions answered right on new sequences; `why` it is
    missing (accuracy None) if the form can not stand in a causal model."""

    form: str
    pairs: int
    accuracy: float | None
    loss: float | None = None
    steps: int = 0
    seconds: float = 0.0
    why: str = ""


def questions(pairs: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(words [count, 3 pairs], answers [count, pairs] to the last `pairs` words)."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(-1)[:, :pairs]
    values = KEYS + torch.randint(0, VALUES, (count, pairs), generator=generator)
    shown = torch.stack([keys, values], -1).flatten(1)
    order = torch.rand(count, pairs, generator=generator).argsort(-1)
    return torch.cat([shown, keys.gather(1, order)], 1), values.gather(1, order)


class _Layer(nn.Module):
    """A short causal convolution, which tells a value what it follows, and an attention."""

    def __init__(self, setup: Setup, form: Form, tokens: int) -> None:
        super().__init__()
        width, heads = setup.width, setup.heads
        each = width // heads
        dims = Dims(setup.batch, heads, heads, tokens, tokens, each, each)
        site = AttentionSite("recall", "recall", dims, "float32", each**-0.5, Mask(causal=True))
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


def train_cell(name: str, pairs: int, setup: Setup, progress: Callable[[int, float], None]) -> Cell:
    """Train one model and test it on sequences it has not seen."""
    start = time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(setup.seed)
        try:
            model = RecallModel(setup, form_named(name), pairs)
        except FormError as error:
            return Cell(name, pairs, None, why=str(error))
    draw = torch.Generator().manual_seed(setup.seed)
    optimiser = torch.optim.AdamW(model.parameters(), setup.rate, weight_decay=0.01, fused=True)
    for step in range(setup.steps):
        share = step / setup.steps
        for group in optimiser.param_groups:
            fall = 0.5 + 0.5 * math.cos(math.pi * share)
            group["lr"] = setup.rate * min(1.0, (step + 1) / 50) * fall
        words, answers = questions(pairs, setup.batch, draw)
        loss = F.cross_entropy(model(words)[:, -pairs:].flatten(0, 1), answers.flatten() - KEYS)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        progress(step + 1, float(loss.detach()))
    accuracy, lost = test(model, pairs, setup)
    return Cell(name, pairs, accuracy, lost, setup.steps, round(time.monotonic() - start, 2))


@torch.no_grad()
def test(model: nn.Module, pairs: int, setup: Setup) -> tuple[float, float]:
    """(share of right answers, mean cross-entropy in nats) on new sequences."""
    draw = torch.Generator().manual_seed(setup.seed + 1_000_003)
    words, answers = questions(pairs, setup.tested, draw)
    logits = torch.cat([model(part)[:, -pairs:] for part in torch.split(words, setup.batch)])
    right = logits.argmax(-1) == answers - KEYS
    lost = F.cross_entropy(logits.flatten(0, 1), answers.flatten() - KEYS)
    return float(right.float().mean()), float(lost)


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
        record: a JSON file that is written after every model, and gone on from.
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
    head = _head(setup)
    kept = read_rows(record, head, "cells", lambda row: Cell(**row), "recall", "another setup")
    done = {(c.form, c.pairs): c for c in kept}
    wanted = [(f, n) for f in forms for n in pairs]
    tell = progress or (lambda *_: None)
    for index, (form, count) in enumerate(wanted):
        if (form, count) not in done:

            def step(at: int, loss: float, i: int = index, label: str = f"{form} {count}") -> None:
                tell(label, i * setup.steps + at, len(wanted) * setup.steps)

            done[form, count] = train_cell(form, count, setup, step)
            write_rows(record, head, "cells", [asdict(c) for c in done.values()])
    return [done[key] for key in wanted]


def to_json(cells: Sequence[Cell], setup: Setup) -> dict[str, Any]:
    """Plain data."""
    return {**_head(setup), "cells": [asdict(c) for c in cells]}


def _head(setup: Setup) -> dict[str, Any]:
    return {"schema": SCHEMA, "setup": asdict(setup)}
