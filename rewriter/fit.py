"""fit: make what was put in behave like what was taken out, without labels, in a given time.

The order: capture, each site alone, a closed-form refit of its projection, all attention blocks
at once on the original's activations, the whole model, then the worst sites back to softmax.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import FitError, UsageError
from passes.substitute import Rewritten
from rewriter.calibration import Batch, check_batches, set_aside, spread_out
from rewriter.capture import Call, capture
from rewriter.fidelity import Fidelity, Metric, compare, run_outputs
from rewriter.fit_block import block_task
from rewriter.fit_loop import Clock, Loop, Task
from rewriter.fit_memory import kept_pages
from rewriter.fit_model import end_task, form_prefix, model_gap, only, teacher_of, trainable
from rewriter.fit_report import FitReport, Recipe, Revert, SiteFit, Stage
from rewriter.fit_site import (
    choose_scale,
    few,
    learn_site,
    measure,
    paired,
    refit_projection,
    sequential_task,
    shortened,
    site_task,
)
from rewriter.fit_state import FitState, StateFolder, fit_key
from rewriter.revert import revert_worst

__all__ = ["FitReport", "Recipe", "fit"]

Progress = Callable[..., None]


def fit(
    rewritten: Rewritten,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    seconds: float,
    held_out: Sequence[Mapping[str, Tensor]] | None = None,
    state_dir: Path | None = None,
    seed: int = 0,
    max_drop: float | None = None,
    metric: Metric | None = None,
    progress: Progress | None = None,
    recipe: Recipe | None = None,
    clock: Clock = time.monotonic,
) -> FitReport:
    """Fit the rewritten sites to the original model, in place.

    Args:
        rewritten: changed in place: parameters, and the plan where a site is reverted.
        batches: model inputs without labels, dicts of tensors by input name.
        seconds: wall-clock budget of the whole fit. 0 with `max_drop` only measures and reverts.
        held_out: inputs that fidelity is measured on; without them some of `batches` are set
            aside (and say less about new data).
        state_dir: saved to every few seconds; a fit that was killed goes on from there.
        seed: fixes the order of the data.
        max_drop: revert the worst sites until 1 - cosine_mean is at most this.
        metric: (outputs, batch) -> vectors [B, C] that fidelity compares; by default the mean of
            the main output over visible tokens.
        progress: called as progress(stage, site, step, total, loss, seconds_left).
        recipe: how the time is spent.
        clock: what the seconds are read from; `time.process_time` makes the budget one of
            processor time, whatever else the machine does.

    Raises:
        UsageError: a budget or max_drop that makes no sense, or no rewritten site.
        FitError: bad calibration data, a foreign or damaged state folder, or nothing finite.
    """
    recipe = recipe or Recipe()
    _check_call(rewritten, seconds, max_drop)
    data = check_batches(batches, rewritten.traced)
    held = None if held_out is None else check_batches(held_out, rewritten.traced, "held-out data")
    run = _Run(rewritten, data, held, seconds, state_dir, seed, metric, progress, recipe, clock)
    try:
        with torch.enable_grad(), kept_pages():
            return run.all(max_drop)
    except KeyboardInterrupt:
        run.save()
        raise


def _check_call(rewritten: Rewritten, seconds: float, max_drop: float | None) -> None:
    if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and max_drop is None):
        raise UsageError(f"seconds: must be a positive number, got {seconds!r}")
    if max_drop is not None and not 0 <= max_drop <= 2:
        raise UsageError(f"max_drop: must be between 0 and 2 (1 - mean cosine), got {max_drop!r}")
    if not rewritten.plan.rewritten:
        raise UsageError("fit: no site of this model was rewritten, so there is nothing to fit")


class _Run:
    """One fit in work."""

    def __init__(
        self,
        rewritten: Rewritten,
        data: list[Batch],
        held: list[Batch] | None,
        seconds: float,
        state_dir: Path | None,
        seed: int,
        metric: Metric | None,
        progress: Progress | None,
        recipe: Recipe,
        clock: Clock,
    ) -> None:
        self.rewritten, self.recipe, self.seconds, self.seed = rewritten, recipe, seconds, seed
        self.metric, self.progress, self.clock = metric, progress, clock
        self.train, self.validation = set_aside(data)
        self.spread = spread_out(self.train, seed)
        self.held = held if held is not None else self.validation
        self.sites = list(rewritten.plan.rewritten)
        self.start, self.cpu_start = clock(), time.process_time()
        self.used_before, self.cpu_before = 0.0, 0.0
        self.loop: Loop | None = None
        self.state = FitState()
        self.folder: StateFolder | None = None
        if state_dir is not None:
            key = fit_key(rewritten.module, rewritten.plan, seed, recipe.to_json(), data)
            self.folder = StateFolder(Path(state_dir), key)
            self._resume()
        self.teacher = teacher_of(rewritten)
        self.gap = model_gap(rewritten, self.teacher, self.validation[:3])

    def all(self, max_drop: float | None) -> FitReport:
        """Every stage, then the report."""
        original = run_outputs(self.teacher.module, self.held, self.metric)

        def against(module: nn.Module) -> Fidelity:
            return compare(original, run_outputs(module, self.held, self.metric))

        records = self.state.records
        if "fidelity_before" not in records:
            records["fidelity_before"] = asdict(against(self.rewritten.module))
            # what both passes took is kept free for the last measurement
            records["reserve"] = self.used() - self.used_before
        if self.seconds > 0:
            self._fit_sites()
            self._fit_in_order()
            self._fit_blocks()
            self._fit_model()
            self._measure_sites("after")
        now = against(self.rewritten.module)
        if not math.isfinite(now.cosine_mean):
            raise FitError("the fitted model gives NaN or infinite values on the held-out data")
        reverted: list[Revert] = []
        if max_drop is not None:
            reverted, now = revert_worst(self.rewritten, against, max_drop, now)
        return self._report(now, reverted)

    # Time and state

    def used(self) -> float:
        """Seconds of fitting so far, those before a kill included."""
        return self.used_before + self.clock() - self.start

    def save(self) -> None:
        """Write the state folder, if there is one."""
        if self.folder is None:
            return
        state = self.state
        state.used = self.used()
        state.cpu = self.cpu_before + time.process_time() - self.cpu_start
        named = dict(self.rewritten.module.named_parameters())
        best = {k: v for k, v in state.tensors.items() if k.startswith("best/")}
        now = {f"now/{n}": named[n].detach().clone() for n in self._changed() if n in named}
        moments = self.loop.snapshot() if self.loop is not None else {}
        state.tensors = {**best, **now, **moments}
        self.folder.save(state)

    def _changed(self) -> list[str]:
        """Names of the parameters that may differ from the original's."""
        names = list(self.state.records.get("touched", []))
        if self.loop is not None:
            names += list(self.loop.task.params)
        return list(dict.fromkeys(names))

    def _resume(self) -> None:
        assert self.folder is not None
        saved = self.folder.load()
        if saved is None:
            return
        self.folder.put_back(self.rewritten.module, saved)
        saved.resumed += 1
        self.state, self.used_before, self.cpu_before = saved, saved.used, saved.cpu

    def _do(self, task: Task) -> None:
        """Run a task, record its stage, save."""
        if not task.params or task.name in self.state.done:
            return
        every, report, clock = self.recipe.save_every, self.progress, self.clock
        self.loop = Loop(task, self.state, self.save, every, report, clock)
        threads = torch.get_num_threads()
        if task.site:
            # One site's tensors are small: threads waiting for each other on a busy machine
            # were measured to cost a factor of ten, one thread is never far behind.
            torch.set_num_threads(1)
        try:
            with only(self.rewritten.module, task.params):
                stage = self.loop.run()
        finally:
            torch.set_num_threads(threads)
        touched = self.state.records.setdefault("touched", [])
        touched.extend(n for n in task.params if n not in touched)
        self.state.records.setdefault("stages", []).append(asdict(stage))
        self._done(task.name)

    def _done(self, name: str) -> None:
        self.loop = None
        self.state.task = ""
        self.state.tensors = {}
        self.state.done.append(name)
        self.save()

    # Stages

    def _fit_sites(self) -> None:
        """Each site alone, on the original's own activations."""
        todo = [s for s in self.sites if f"site {s}" not in self.state.done]
        if not todo and "measure before" in self.state.done:
            return
        calls = capture(self.teacher, self.spread, self.sites, self.recipe.capture_bytes)
        self._measure_sites("before", calls)
        share = self.recipe.site_share * self.seconds / len(self.sites)
        for site in todo:
            prefix = form_prefix(self.rewritten, site)
            attention = self.rewritten.attention(site)
            test = [shortened(attention, c) for c in few(calls[site], self.recipe.tokens)]
            learned = learn_site(attention, calls[site], self.seed)
            if learned:
                names = [f"{prefix}{n}" for n in learned]
                self.state.records.setdefault("touched", []).extend(names)
                self._done(f"site {site}")
                continue
            if self.state.task != f"site {site}" and attention.form.trainable:
                choose_scale(attention, test, self.recipe.scales)
            self._do(
                site_task(self.rewritten, site, calls[site], self.recipe, share, self.seed, prefix)
            )

    def _measure_sites(self, when: str, calls: Mapping[str, list[Call]] | None = None) -> None:
        """Errors of every rewritten site on the original's own activations, into the records."""
        if f"measure {when}" in self.state.done:
            return
        if calls is None:
            some = self.validation[: max(1, 64 // len(self.validation[0]))]
            calls = capture(self.teacher, some, self.sites, self.recipe.capture_bytes // 4)
        found = {}
        for site in self.sites:
            attention = self.rewritten.attention(site)
            kept = few(calls[site], self.recipe.tokens)
            found[site] = measure(attention, [shortened(attention, c) for c in kept])
        self.state.records[f"errors_{when}"] = found
        self._done(f"measure {when}")

    def _fit_in_order(self) -> None:
        """Each site behind the rewritten ones before it, and the refit of its projection."""
        share = self.recipe.sequential_share * self.seconds / len(self.sites)
        todo = [s for s in self.sites if f"refit {s}" not in self.state.done]
        if not todo:
            return
        size = self.recipe.capture_bytes // 4  # more rows cost more than a refit gains
        theirs = capture(self.teacher, self.spread, todo, size)
        for site in todo:
            mine = capture(self.rewritten, self.spread, [site], size // len(todo))[site]
            calls = paired(mine, theirs[site])
            prefix = form_prefix(self.rewritten, site)
            if share:
                self._do(
                    sequential_task(
                        self.rewritten, site, calls, self.recipe, share, self.seed, prefix
                    )
                )
            self._refit(site, calls)

    def _refit(self, site: str, calls: list[Call]) -> None:
        note = "not asked for"
        if self.recipe.refit:
            before, old = self.gap(), _copy(self.rewritten.module)
            done, names, note = refit_projection(self.rewritten, site, calls)
            if names and not self.gap() < before:
                _put_back(self.rewritten.module, {n: old[n] for n in names})
                done, names, note = None, [], "the whole model was no better with the refit"
            self.state.records.setdefault("touched", []).extend(names)
            if done is not None:
                pair = [done.before**0.5, done.after**0.5]
                self.state.records.setdefault("projection", {})[site] = pair
        self.state.records.setdefault("notes", {})[site] = note
        self._done(f"refit {site}")

    def _fit_blocks(self) -> None:
        """The attention blocks of all rewritten sites at once, on the original's activations."""
        if "blocks" in self.state.done or not self.recipe.block_share:
            return
        seconds = self.recipe.block_share * self.seconds
        recipe, seed = self.recipe, self.seed
        self._do(
            block_task(
                self.rewritten, self.teacher, self.train, self.validation, recipe, seconds, seed
            )
        )

    def _fit_model(self) -> None:
        """The whole model with the time that is left."""
        if "end" in self.state.done or not trainable(self.rewritten, self.recipe)[0]:
            return
        left = self.seconds - self.used() + self._spent("end")
        left -= min(self.state.records.get("reserve", 0.0), 0.08 * self.seconds)
        if left <= 0:
            self.state.records["late"] = True
            return
        self._do(
            end_task(
                self.rewritten,
                self.teacher,
                self.train,
                self.validation,
                self.recipe,
                left,
                self.seed,
            )
        )

    def _spent(self, task: str) -> float:
        return self.state.task_seconds if self.state.task == task else 0.0

    # Report

    def _report(self, now: Fidelity, reverted: list[Revert]) -> FitReport:
        records = self.state.records
        stages = tuple(Stage(**s) for s in records.get("stages", ()))
        return FitReport(
            sites=tuple(self._site(s) for s in self.sites if "errors_after" in records),
            stages=stages,
            fidelity_before=Fidelity.from_json(records["fidelity_before"]),
            fidelity=now,
            reverted=tuple(reverted),
            seconds=round(self.used(), 3),
            cpu_seconds=round(self.cpu_before + time.process_time() - self.cpu_start, 3),
            seed=self.seed,
            resumed=self.state.resumed,
            notes=tuple(_notes(stages, records)),
        )

    def _site(self, site: str) -> SiteFit:
        records = self.state.records
        before, after = records["errors_before"][site], records["errors_after"][site]
        pair = records.get("projection", {}).get(site)
        return SiteFit(
            id=site,
            form=self.rewritten.plan[site].form,
            error_before=before[0],
            error_after=after[0],
            divergence_before=before[1],
            divergence_after=after[1],
            projection=None if pair is None else (pair[0], pair[1]),
            note=records.get("notes", {}).get(site, ""),
        )


def _notes(stages: Sequence[Stage], records: Mapping[str, Any]) -> list[str]:
    notes = [
        f"{s.name} {s.site}: {s.skipped} steps had a loss that is not finite; "
        "each went back to the best state at half the learning rate"
        for s in stages
        if s.skipped
    ]
    if records.get("late"):
        notes.append("no time was left for the end-to-end stage; give more seconds")
    return notes


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


@torch.no_grad()
def _put_back(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    named = dict(module.named_parameters())
    for name, value in values.items():
        named[name].copy_(value)
