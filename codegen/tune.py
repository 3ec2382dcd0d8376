"""Tuning: which kernel gets the next trial, what a trial leaves behind, and who wins."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import tirx

from codegen.host import this_host, why_foreign
from codegen.schedule import workload_key
from codegen.target import Target
from codegen.trace_store import Best, KernelStore, Store, Trial
from codegen.tune_client import Client, Refused, WorkerDied
from codegen.tune_space import Search
from passes.errors import TuningError

Progress = Callable[..., None]
# A winner must be faster than the default by this much, in the trial and when measured again.
MARGIN = 0.97
NOTHING = "there is no other schedule to try"
TRIAL_ROUNDS, CONFIRM_ROUNDS, CONFIRM_SEEDS = 7, 25, (1, 2, 3)
TRIAL_TIMEOUT = 20.0
# Kernels whose workers die or whose trials fail over and over are left alone.
_FAILURES = 12
_TURN_SECONDS = 1.0
# After so many trials without a better one a kernel counts half.
_STALE = 20


def versions() -> dict[str, str]:
    """The versions a schedule depends on."""
    return {n: importlib.metadata.version(n) for n in ("apache-tvm", "apache-tvm-ffi")}


def session_key(target: Target) -> dict[str, Any]:
    """What a whole session is bound to: the target as plain data, and TVM's versions."""
    facts = target.to_json()
    facts.pop("description")
    return {"target": facts, "versions": versions()}


def require_tunable(target: Target) -> None:
    """`TuningError` for a target whose code can not be timed in this process's machine."""
    why = "" if target.kind == "cpu" else f"it is of kind {target.kind!r}"
    why = why or why_foreign(target.to_json(), target.features, this_host())
    if why:
        raise TuningError(
            f"target {target.name!r} can not be tuned here: {why}; candidates are timed on this "
            "machine's processor (--target cpu)"
        )


def add_kernels(store: Store, unscheduled: Any, calls: Mapping[str, int], forms: Any) -> None:
    """Put a model's kernels into a session; kernels it has already stay as they are.

    Args:
        store: the session.
        unscheduled: the module before scheduling (`Lowered.unscheduled`).
        calls: {kernel name: calls per inference}, of the kernels to tune.
        forms: plain data that says which forms the model has, kept for readers.

    Raises:
        TuningError: the session has kernels, and not one of them is this model's.
    """
    found = {workload_key(unscheduled[name]): name for name in calls}
    if store.kernels and not set(found) & set(store.kernels):
        raise TuningError(
            f"session {store.folder}: holds the kernels of another model (or of other shapes); "
            "name another folder"
        )
    for key, name in found.items():
        store.kernel(key).put_func(tvm.ir.save_json(unscheduled[name]))
        same = [n for n in calls if workload_key(unscheduled[n]) == key]
        store.kernels[key] = {"name": name, "calls": sum(calls[n] for n in same)}
    known = store.record["key"].setdefault("forms", [])
    if forms not in known:
        known.append(forms)
    store.save()


@dataclass
class _Task:
    """One kernel while a session runs."""

    key: str
    name: str
    calls: int
    files: KernelStore
    trials: list[Trial] = field(default_factory=list)
    best: Best | None = None
    search: Search | None = None
    ended: bool = False
    failures: int = 0

    @property
    def spent(self) -> float:
        return sum(t.spent for t in self.trials)

    @property
    def default_seconds(self) -> float:
        """Median of what the default took, over all trials."""
        known = sorted(t.default_seconds for t in self.trials if t.default_seconds)
        return known[len(known) // 2] if known else 0.0

    @property
    def hope(self) -> float:
        """Time in the model against time spent, less the longer nothing better was found."""
        weight = self.default_seconds * self.calls * (self.best.ratio if self.best else 1.0)
        stale = len(self.trials) - (self.best.trial if self.best else 0)
        return weight / (self.spent + 0.5) / (1 + stale / _STALE)


class Tuner:
    """Runs one session's trials until its time is over."""

    def __init__(self, store: Store, target: Target, progress: Progress | None) -> None:
        self.store, self.target, self.progress = store, target, progress
        self.tasks = [self._task(key, facts) for key, facts in store.kernels.items()]
        self._last = time.monotonic()
        self._start = self._until = 0.0

    def _task(self, key: str, facts: Mapping[str, Any]) -> _Task:
        files = self.store.kernel(key)
        files.mend()
        task = _Task(key, facts["name"], facts["calls"], files, files.trials())
        try:
            task.best = files.best()
        except ValueError:
            task.best = None  # altered: found anew, or never applied
        return task

    @property
    def used(self) -> float:
        """Seconds spent in this session so far, over all its runs."""
        return sum(task.spent for task in self.tasks)

    def run(self, until: float) -> bool:
        """Trials until `used` reaches `until`; True if nothing was left to try before."""
        self._start, self._until = self.used, until
        self._last = time.monotonic()
        with Client(self.target) as client:
            opened = ""
            while self.used < until:
                task = self._choose()
                if task is None:
                    return True
                self._report(task)
                fresh = not task.trials
                if task.key != opened:
                    opened = task.key if self._open(client, task) else ""
                if opened and not fresh:
                    self._turn(client, task)
        return False

    def _choose(self) -> _Task | None:
        """Kernels never measured first; then the one with most hope."""
        for task in self.tasks:
            if not task.trials:
                return task
        live = [t for t in self.tasks if not t.ended]
        return max(live, key=lambda t: t.hope, default=None)

    def _report(self, task: _Task) -> None:
        if self.progress is not None:
            gain = f" {1 / task.best.ratio:.2f}x" if task.best else ""
            total = self._until - self._start
            self.progress(f"{task.name}{gain}", min(self.used - self._start, total), total)

    def _spent(self) -> float:
        now = time.monotonic()
        spent, self._last = now - self._last, now
        return round(spent, 4)

    def _keep(self, task: _Task, **facts: Any) -> None:
        trial = Trial(spent=self._spent(), **facts)
        task.files.append(trial)
        task.trials.append(trial)

    def _open(self, client: Client, task: _Task) -> bool:
        """Build the default in the worker; the first time its time is kept too."""
        try:
            seconds = client.open(task.files.func_json(), 3 * TRIAL_TIMEOUT)
        except (Refused, WorkerDied) as error:
            self._keep(task, trace=None, error=str(error))
            task.ended = True
            return False
        if not task.trials:
            self._keep(task, trace=None, seconds=seconds, default_seconds=seconds, ratio=1.0)
        return True

    def _turn(self, client: Client, task: _Task) -> None:
        """Trials of one kernel for a while (opening it costs a build), or until none is left."""
        search = self._search(task)
        stop = min(self._until, self.used + max(_TURN_SECONDS, 0.05 * (self._until - self.used)))
        while self.used < stop and not task.ended:
            trace = search.next()
            if trace is None:
                task.ended = True
                if not any(t.trace is not None or t.error for t in task.trials):
                    self._keep(task, trace=None, error=NOTHING)
                return
            self._try(client, task, search, trace)
            self._report(task)

    def _search(self, task: _Task) -> Search:
        if task.search is None:
            func = tvm.ir.load_json(task.files.func_json())
            seed = 1 + (int(task.key, 16) + len(task.trials)) % ((1 << 30) - 1)
            task.search = Search(func, self.target, seed=seed)
            for trial in task.trials:
                if trial.trace is not None:
                    task.search.tell(trial.trace, trial.seconds, trial.ratio)
        return task.search

    def _try(self, client: Client, task: _Task, search: Search, trace: Any) -> None:
        try:
            found = client.trial(trace, seeds=[0], rounds=TRIAL_ROUNDS, timeout=TRIAL_TIMEOUT)
            bar = MARGIN if task.best is None else min(MARGIN, task.best.ratio)
            best = self._confirm(client, task, trace) if found["ratio"] < bar else None
            facts = {k: found[k] for k in ("seconds", "default_seconds", "ratio")}
        except (Refused, WorkerDied) as error:
            task.failures += 1
            task.ended = task.failures >= _FAILURES
            search.tell(trace, None, None)
            self._keep(task, trace=trace, error=str(error))
            return
        task.failures = 0
        search.tell(trace, facts["seconds"], facts["ratio"])
        if best is not None:  # before the record: a kill between the two loses nothing
            task.best = best
            task.files.put_best(best)
        self._keep(task, trace=trace, **facts)

    def _confirm(self, client: Client, task: _Task, trace: Any) -> Best | None:
        """Measure a would-be winner longer and on other inputs; `Refused` if it is wrong."""
        found = client.trial(
            trace, seeds=list(CONFIRM_SEEDS), rounds=CONFIRM_ROUNDS, timeout=3 * TRIAL_TIMEOUT
        )
        if found["ratio"] >= (MARGIN if task.best is None else min(MARGIN, task.best.ratio)):
            return None
        return Best(trial=len(task.trials), trace=trace, seeds=1 + len(CONFIRM_SEEDS), **found)


def kernel_calls(lowered: Any) -> dict[str, int]:
    """{kernel name: calls per inference} of a `Lowered`, of kernels with static shapes."""
    return {k.name: k.count for k in lowered.kernels if _static(lowered.unscheduled[k.name])}


def _static(func: Any) -> bool:
    sizes = [n for p in func.params for n in getattr(p.ty, "shape", [None])]
    return all(isinstance(n, int | tirx.IntImm) for n in sizes)
