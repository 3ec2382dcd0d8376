"""TuningSession: long search for better schedules in a folder, and its records for `compile`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codegen.target import Target, target_named
from codegen.trace_store import Best, Lock, Store, Trial
from passes.errors import UsageError
from rewriter.wording import milliseconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from codegen.tuned import Tuned
    from rewriter.api import Result

Progress = Callable[..., None]


@dataclass(frozen=True)
class KernelState:
    """One kernel of a session: its trials counted, and its default against its best.

    `seconds` are of one call; `best` is None while the default is the fastest.
    """

    key: str
    name: str
    calls: int
    trials: int
    failed: int
    spent: float
    default_seconds: float | None
    best: Best | None
    note: str = ""

    @property
    def share_seconds(self) -> float:
        """Time in one inference under the default."""
        return (self.default_seconds or 0.0) * self.calls

    @property
    def ratio(self) -> float:
        """Best over default, 1 where the default stays."""
        return self.best.ratio if self.best else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the traces."""
        best = self.best.to_json() if self.best else None
        if best is not None:
            best.pop("trace")
        return {**vars(self), "best": best, "speedup": 1 / self.ratio}


@dataclass
class TuningSession:
    """A folder in which the kernels of models are tuned for one target.

    `state` is "new", "interrupted" (a run was stopped or killed before its time) or "finished";
    `budget` the seconds of the last run asked for. Made by `open`; `run` may be called again.
    """

    folder: Path
    target: Target
    store: Store
    kernels: tuple[KernelState, ...] = field(default=())

    @classmethod
    def open(cls, folder: Path, result: Result, *, target: str | Target = "cpu") -> TuningSession:
        """Make a session for a rewritten model, or go on with the one in `folder`.

        Kernels the session does not have yet are added.

        Raises:
            TuningError: the folder was made for another target, TVM or model, is damaged or
                holds other files, or another process tunes there.
        """
        from codegen.tune import add_kernels, kernel_calls, require_tunable, session_key
        from rewriter.pipeline import Stages, lower_result

        chosen = target_named(target) if isinstance(target, str) else target
        require_tunable(chosen)
        store = Store.open(folder, session_key(chosen))
        with Lock(folder):
            lowered = lower_result(result, chosen, Stages(None))
            store = Store.load(folder)
            add_kernels(store, lowered.unscheduled, kernel_calls(lowered), _forms(result))
        session = cls(folder, chosen, store)
        session._read()
        return session

    @property
    def key(self) -> dict[str, Any]:
        """What the records are valid for: workloads, target, TVM's versions, forms."""
        made_for: dict[str, Any] = self.store.record["key"]
        return {**made_for, "workloads": sorted(self.store.kernels)}

    @property
    def state(self) -> str:
        """ "new", "interrupted" or "finished"."""
        run = self.store.record["run"]
        if run is None:
            return "new"
        return "finished" if run["finished"] else "interrupted"

    @property
    def budget(self) -> float:
        """Seconds of the last run asked for; 0 before the first."""
        return float((self.store.record["run"] or {"seconds": 0.0})["seconds"])

    @property
    def best(self) -> dict[str, Best | None]:
        """{kernel name: its checked winner, or None where the default stays}."""
        return {k.name: k.best for k in self.kernels}

    def run(self, *, minutes: float, progress: Progress | None = None) -> None:
        """Search for `minutes`. A run that was killed is finished first: its time counts.

        `progress(stage, done, total)` gets the kernel in work and seconds.

        Raises:
            TuningError: another process tunes in this folder. UsageError: minutes is not positive.
        """
        from codegen.tune import Tuner

        if not 0 < minutes < float("inf"):
            raise UsageError(f"minutes is {minutes}: it must be a positive number")
        with Lock(self.folder):
            self.store = Store.load(self.folder)
            tuner = Tuner(self.store, self.target, progress)
            run = self._begin(60 * minutes, tuner.used)
            tuner.run(run["from"] + run["seconds"])
            run["finished"] = True
            self.store.save()
        self._read()

    def _begin(self, seconds: float, used: float) -> dict[str, Any]:
        """The run to do: the interrupted one if it asked for the same time, else a new one."""
        run: dict[str, Any] | None = self.store.record["run"]
        if run is None or run["finished"] or run["seconds"] != seconds:
            run = {"seconds": seconds, "from": used, "finished": False}
            self.store.record["run"] = run
            self.store.save()
        return run

    def _read(self) -> None:
        found = [self._kernel(key, facts) for key, facts in self.store.kernels.items()]
        self.kernels = tuple(sorted(found, key=lambda k: -k.share_seconds))

    def _kernel(self, key: str, facts: dict[str, Any]) -> KernelState:
        files = self.store.kernel(key)
        trials, note = files.trials(), ""
        try:
            best = files.best()
        except (ValueError, TypeError) as error:
            best, note = None, str(error)
        tried = [t for t in trials if t.trace is not None]
        first = [t.error for t in trials if t.trace is None and t.error]
        return KernelState(
            key=key,
            name=facts["name"],
            calls=facts["calls"],
            trials=len(tried),
            failed=sum(bool(t.error) for t in tried),
            spent=round(sum(t.spent for t in trials), 3),
            default_seconds=_median([t for t in trials if t.default_seconds]),
            best=best,
            note=note or (first[0] if first else ""),
        )

    @property
    def trials(self) -> int:
        """Candidates tried so far."""
        return sum(k.trials for k in self.kernels)

    @property
    def speedup(self) -> float:
        """Time of all kernels under their defaults over that under the best, called as often."""
        before = sum(k.share_seconds for k in self.kernels)
        after = sum(k.share_seconds * k.ratio for k in self.kernels)
        return before / after if after else 1.0

    def to_json(self) -> dict[str, Any]:
        """Key, budget, state, kernels with their best, and the sum's gain, as plain data."""
        return {
            "folder": str(self.folder),
            "key": self.key,
            "state": self.state,
            "budget_seconds": self.budget,
            "used_seconds": round(sum(k.spent for k in self.kernels), 3),
            "trials": self.trials,
            "kernels_speedup": self.speedup,
            "kernels": [k.to_json() for k in self.kernels],
        }

    def table(self) -> RenderableType:
        """The kernels, slowest first, as a table for the terminal."""
        from rich.table import Table
        from rich.text import Text

        title = (
            f"{self.folder}: {self.trials} trials, {self.state}; all kernels together "
            f"{self.speedup:.2f}x as fast as under the rules"
        )
        table = Table(title=Text(title), title_justify="left", header_style="bold")
        for column in ("kernel", "calls", "trials", "failed", "default", "best", "gain", ""):
            table.add_column(column, justify="left" if column in ("kernel", "") else "right")
        for k in self.kernels:
            default = k.default_seconds
            table.add_row(
                Text(k.name),
                str(k.calls),
                str(k.trials),
                str(k.failed),
                milliseconds(1e3 * default) if default else "",
                milliseconds(1e3 * default * k.ratio) if default and k.best else "",
                f"{1 / k.ratio:.2f}x" if k.best else "default",
                Text(k.note),
            )
        return table


def records_for(folder: Path | str, target: str | Target) -> Tuned:
    """The records of a session, for `codegen.lower.lower(tuned=...)`.

    Raises:
        TuningError: no session is there, or it was made for another target or TVM.
    """
    store = Store.load(Path(folder))
    from codegen.tuned import Tuned

    return Tuned(store, target_named(target) if isinstance(target, str) else target)


def _median(trials: list[Trial]) -> float | None:
    times = sorted(t.default_seconds or 0.0 for t in trials)
    return times[len(times) // 2] if times else None


def _forms(result: Result) -> list[dict[str, Any]]:
    """The forms of a plan with their settings, each once."""
    found: list[dict[str, Any]] = []
    for choice in result.plan.choices.values():
        facts = {"form": choice.form, "config": dict(choice.config)}
        if facts not in found:
            found.append(facts)
    return found
