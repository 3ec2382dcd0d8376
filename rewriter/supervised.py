"""fine_tune: train a rewritten model on a user's own loss and labelled data.

The loop, in full: every step takes one batch in a seeded order, computes ``loss(outputs, batch)``
and makes one Adam step under a cosine fall of the rates; ten times it looks at the batches that
were set aside and keeps the best state. With ``refresh=n`` hashed forms learn their hashes anew
from the model's own activations at the start of every n-th round over the batches
(rewriter/refresh.py). A killed run goes on from its state folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.errors import FitError, UsageError
from passes.substitute import Rewritten
from rewriter.calibration import Batch, check_batches, input_names, set_aside
from rewriter.fit_loop import Loop, Task, shuffled
from rewriter.fit_model import form_names, only, with_rates
from rewriter.fit_report import Stage
from rewriter.fit_state import FitState, StateFolder, fit_key
from rewriter.refresh import Refresh

Loss = Callable[[Any, Mapping[str, Tensor]], Tensor]
Progress = Callable[..., None]


@dataclass(frozen=True)
class Rates:
    """Learning rates of the forms' parameters and of all other weights (0 keeps those as they
    are), and how many steps at most (0: only time counts)."""

    forms: float = 2e-3
    weights: float = 5e-4
    steps: int = 0

    def __post_init__(self) -> None:
        for name in ("forms", "weights", "steps"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise UsageError(f"{name}: must be a number from 0, got {value!r}")
        if not self.forms and not self.weights:
            raise UsageError("rates: both are 0, so nothing would be trained")


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tuning did: validation losses before and after, steps, seconds."""

    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    skipped: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def fine_tune(
    rewritten: Rewritten,
    batches: Sequence[Mapping[str, Tensor]],
    loss: Loss,
    *,
    seconds: float,
    validation: Sequence[Mapping[str, Tensor]] | None = None,
    rates: Rates | None = None,
    state_dir: Path | None = None,
    seed: int = 0,
    refresh: int = 0,
    progress: Progress | None = None,
) -> FineTuned:
    """Train a rewritten model, in place, on labelled data.

    Args:
        rewritten: changed in place (all float parameters, those of the forms faster).
        batches: dicts of tensors: the model's inputs by name, and whatever else `loss` reads.
        loss: ``loss(outputs, batch) -> scalar``; outputs are what the model returns.
        seconds: wall-clock budget.
        validation: batches the best state is chosen on; without them some of `batches`.
        rates: learning rates and the most steps.
        state_dir: saved to every few seconds; a run that was killed goes on from there.
        seed: fixes the order of the batches.
        refresh: epochs (rounds over `batches`) after which forms with a hash (`hamming`,
            `shiftadd`) learn it anew from the model as it then is; one that has seen no data is
            learned before the first step. 0: hashes stay as they are.
        progress: called as progress(stage, site, step, total, loss, seconds_left).

    Raises:
        UsageError: a budget that makes no sense. FitError: bad data, a foreign state folder, or a
        loss that is not a finite scalar tensor.
    """
    if not math.isfinite(seconds) or seconds <= 0:
        raise UsageError(f"seconds: must be a positive number, got {seconds!r}")
    rates = rates or Rates()
    inputs = set(input_names(rewritten.traced))
    data = _checked(rewritten, batches, inputs, "training data")
    held = None if validation is None else _checked(rewritten, validation, inputs, "validation")
    if held is None:
        data, held = set_aside(data)
    _probe(rewritten, loss, held[0], inputs)
    bare = [{n: v for n, v in b.items() if n in inputs} for b in data]
    hashes = Refresh(rewritten, bare, refresh, seed)
    task = _task(rewritten, data, held, loss, inputs, rates, seconds, seed, hashes)
    state, save = _state(rewritten, state_dir, seed, rates, data, task, refresh)
    loop = Loop(task, state, lambda: save(loop), 8.0, progress)
    try:
        with torch.enable_grad(), only(rewritten.module, task.params):
            stage: Stage = loop.run()
    except KeyboardInterrupt:
        save(loop)
        raise
    return FineTuned(stage.loss_before, stage.loss_after, stage.steps, stage.seconds, stage.skipped)


def _checked(
    rewritten: Rewritten, batches: Sequence[Mapping[str, Tensor]], inputs: set[str], what: str
) -> list[Batch]:
    """The batches with every key, after the checks of the model's own inputs."""
    mine = [{n: v for n, v in b.items() if n in inputs} for b in batches]
    check_batches(mine, rewritten.traced, what)
    return [dict(b) for b in batches]


def _outputs(rewritten: Rewritten, batch: Batch, inputs: set[str]) -> Any:
    return rewritten.module(**{n: v for n, v in batch.items() if n in inputs})


@torch.no_grad()
def _probe(rewritten: Rewritten, loss: Loss, batch: Batch, inputs: set[str]) -> None:
    """One call of the user's loss before the work, with a message that is about the loss."""
    outputs = _outputs(rewritten, batch, inputs)
    try:
        value = loss(outputs, batch)
    except Exception as error:
        known = ", ".join(sorted(batch))
        raise FitError(
            f"loss: raised {type(error).__name__}: {error} (called as loss(outputs, batch), and "
            f"the batch has {known})"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise FitError(f"loss: must return a tensor with one number, got {type(value).__name__}")
    if not bool(torch.isfinite(value)):
        raise FitError("loss: is not finite on the first batch; check the labels")


def _task(
    rewritten: Rewritten,
    data: list[Batch],
    held: list[Batch],
    loss: Loss,
    inputs: set[str],
    rates: Rates,
    seconds: float,
    seed: int,
    hashes: Refresh,
) -> Task:
    named = [n for n, _ in rewritten.module.named_parameters()]
    by_name = dict.fromkeys(named, rates.weights) | dict.fromkeys(
        form_names(rewritten), rates.forms
    )
    params, chosen = with_rates(rewritten, {n: r for n, r in by_name.items() if r > 0})
    # Hashes take no gradient, but the best state and a resumed run need those that go with them.
    params = {**hashes.params, **params}
    chosen = {**dict.fromkeys(params, 0.0), **chosen}

    def one(step: int, done: float) -> Tensor:
        hashes.before(step)
        batch = data[shuffled(step, len(data), seed, "fine-tune")]
        return loss(_outputs(rewritten, batch, inputs), batch)

    @torch.no_grad()
    def validate() -> float:
        return sum(float(loss(_outputs(rewritten, b, inputs), b)) for b in held) / len(held)

    name = "fine-tune"
    return Task(name, name, "", params, chosen, one, validate, seconds, rates.steps)


def _state(
    rewritten: Rewritten,
    state_dir: Path | None,
    seed: int,
    rates: Rates,
    data: list[Batch],
    task: Task,
    refresh: int,
) -> tuple[FitState, Callable[[Loop], None]]:
    """(where the run stands, what saves it)."""
    if state_dir is None:
        return FitState(), lambda loop: None
    recipe = {"fine-tune": asdict(rates) | ({"refresh": refresh} if refresh else {})}
    key = fit_key(rewritten.module, rewritten.plan, seed, recipe, data)
    folder = StateFolder(Path(state_dir), key)
    state = folder.load()
    if state is None:
        state = FitState()
    else:
        folder.put_back(rewritten.module, state)
        state.resumed += 1
    start, before = time.monotonic(), state.used

    def save(loop: Loop) -> None:
        state.used = before + time.monotonic() - start
        best = {k: v for k, v in state.tensors.items() if k.startswith("best/")}
        now = {f"now/{n}": p.detach().clone() for n, p in task.params.items()}
        state.tensors = {**best, **now, **loop.snapshot()}
        folder.save(state)

    return state, save
