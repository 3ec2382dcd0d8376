"""One optimisation of the fit: Adam within a share of the time, best state kept, resumable."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rewriter.fit_report import Stage
from rewriter.fit_state import FitState

Report = Callable[..., None]
Clock = Callable[[], float]
WARM_UP = 10  # steps, at least
WARM_SHARE = 0.08  # of the task; Adam's first steps move every weight alike, useful or not
CHECKS = 10  # validations of one loop
PATIENCE = 5  # validations without a better one
EARLIEST = 0.9  # share of a task before which it does not end: most is gained as the rate falls
MOST_SKIPS = 8  # steps without a finite loss before the loop gives up
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Task:
    """What a loop minimises.

    `loss(step, done)` gives the training loss of a step (`done` is the share of the task done),
    `validate()` the loss that decides what is best; `rates` the learning rate
    of each parameter by name. `steps` 0: only time counts.
    """

    name: str
    stage: str
    site: str
    params: Mapping[str, nn.Parameter]
    rates: Mapping[str, float]
    loss: Callable[[int, float], Tensor]
    validate: Callable[[], float]
    seconds: float
    steps: int = 0


def shuffled(step: int, count: int, seed: int, name: str) -> int:
    """Which of `count` items a step uses: a new seeded order in every round."""
    order = list(range(count))
    random.Random(f"{seed} {name} {step // count}").shuffle(order)
    return order[step % count]


class Loop:
    """Runs a `Task` from where `state` says it stands; `save` is called every few seconds."""

    def __init__(
        self,
        task: Task,
        state: FitState,
        save: Callable[[], None],
        save_every: float,
        report: Report | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.task, self.state, self.save_now, self.report = task, state, save, report
        self.save_every, self.clock = save_every, clock
        groups = [
            {"params": [p for n, p in task.params.items() if task.rates[n] == rate], "base": rate}
            for rate in sorted(set(task.rates.values()))
        ]
        self.optimiser = torch.optim.Adam(groups, betas=(0.9, 0.98), fused=True)
        self.misses = 0
        self.checked = 0
        self.last_loss = math.nan

    def run(self) -> Stage:
        """Minimise; leaves the best parameters seen in place."""
        self._begin()
        start, before = self.clock(), self.state.task_seconds
        saved = start
        while self._fraction() < 1 and not self._hopeless():
            self._step()
            now = self.clock()
            self.state.task_seconds = before + now - start
            self._check()
            if now - saved >= self.save_every:
                self.save_now()
                saved = self.clock()
        if self.checked < CHECKS:
            self._validate()
        self._restore()
        return self._stage()

    def snapshot(self) -> dict[str, Tensor]:
        """Adam's moments by name, for the state folder."""
        kept: dict[str, Tensor] = {}
        for name, param in self.task.params.items():
            moments = self.optimiser.state.get(param, {})
            for moment in (*MOMENTS, "step"):
                if moment in moments:
                    kept[f"adam/{moment}/{name}"] = moments[moment].clone()
        return kept

    def _begin(self) -> None:
        state, task = self.state, self.task
        if state.task == task.name:
            self._resume()
            return
        state.task, state.step, state.task_seconds, state.skipped = task.name, 0, 0.0, 0
        state.lr_factor, state.best = 1.0, None
        state.tensors = {}
        self._keep_best(task.validate())
        state.loss_before = state.best

    def _resume(self) -> None:
        self.checked = int(self._fraction() * CHECKS)
        for name, param in self.task.params.items():
            saved = {m: self.state.tensors.get(f"adam/{m}/{name}") for m in (*MOMENTS, "step")}
            if all(t is not None for t in saved.values()):
                self.optimiser.state[param] = {
                    m: t.clone() for m, t in saved.items() if t is not None
                }

    def _fraction(self) -> float:
        by_time = self.state.task_seconds / max(self.task.seconds, 1e-9)
        if by_time >= 1 or not self.task.steps:
            return by_time
        return self.state.step / self.task.steps

    def _hopeless(self) -> bool:
        stuck = self.misses >= PATIENCE and self._fraction() >= EARLIEST
        return stuck or self.state.skipped >= MOST_SKIPS

    def _step(self) -> None:
        state = self.state
        done = min(self._fraction(), 1.0)
        fall = 0.5 + 0.5 * math.cos(math.pi * done)
        warm = min(1.0, (state.step + 1) / WARM_UP, (done + 0.01) / WARM_SHARE)
        factor = state.lr_factor * warm * fall
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * factor
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.task.loss(state.step, done)
        state.step += 1
        if not bool(torch.isfinite(loss.detach())):
            return self._skip()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(list(self.task.params.values()), 1.0)
        if not bool(torch.isfinite(norm)):
            return self._skip()
        self.optimiser.step()
        self.last_loss = float(loss.detach())
        self._tell()

    def _skip(self) -> None:
        """A loss or gradient that is not finite: back to the best state, at half the rate."""
        self.state.skipped += 1
        self.state.lr_factor *= 0.5
        self.optimiser.zero_grad(set_to_none=True)
        self.optimiser.state.clear()
        self._restore()

    def _tell(self) -> None:
        if self.report is not None:
            task, state = self.task, self.state
            left = max(0.0, task.seconds - state.task_seconds)
            done = min(1.0, self._fraction())
            total = task.steps or round(state.step / max(done, 1e-3))
            self.report(task.stage, task.site, state.step, total, self.last_loss, left)

    def _check(self) -> None:
        due = int(min(self._fraction(), 1.0) * CHECKS)
        if due > self.checked:
            self.checked = due
            self._validate()

    def _validate(self) -> None:
        value = self.task.validate()
        best = self.state.best
        if math.isfinite(value) and (best is None or not math.isfinite(best) or value < best):
            self._keep_best(value)
            self.misses = 0
        else:
            self.misses += 1

    def _keep_best(self, value: float) -> None:
        self.state.best = value
        for name, param in self.task.params.items():
            self.state.tensors[f"best/{name}"] = param.detach().clone()

    @torch.no_grad()
    def _restore(self) -> None:
        for name, param in self.task.params.items():
            param.copy_(self.state.tensors[f"best/{name}"])

    def _stage(self) -> Stage:
        state = self.state
        before, after = state.loss_before, state.best
        return Stage(
            self.task.stage,
            self.task.site,
            round(state.task_seconds, 3),
            state.step,
            math.nan if before is None else before,
            math.nan if after is None else after,
            state.skipped,
        )
