"""Progress bars for long work: drawn on stderr with an estimate, silent where it is no terminal.

Long work reports through one callable, either ``progress(stage, done, total)`` or, while fitting,
``progress(stage, site, step, total, loss, seconds_left)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)


@contextmanager
def shown(what: str, console: Console) -> Iterator[Callable[..., None]]:
    """Draw a bar titled `what` while the block runs; gives the callable to report through.

    Where `console` is no terminal one plain line a stage is written instead.
    """
    if not console.is_terminal:
        yield _Lines(what, console)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None, left="")
        fit = _Budget()

        def report(stage: str, *facts: Any) -> None:
            if len(facts) == 2:
                done, total = facts
                left = ""
            else:
                site, step, steps, loss, seconds = facts
                done, total = fit.share(seconds)
                stage = _fit_words(stage, site, step, steps, loss)
                left = f"{max(0.0, seconds or 0.0):.0f} s left"
            text = f"{what}: {stage}"[: max(20, console.width - 60)]
            bar.update(task, description=text, completed=done, total=total, left=left)

        yield report


class _Budget:
    """Turns the seconds left of a time budget into a share done."""

    def __init__(self) -> None:
        self.whole = 0.0

    def share(self, seconds_left: float | None) -> tuple[float, float]:
        left = max(0.0, seconds_left or 0.0)
        self.whole = max(self.whole, left, 1e-9)
        return self.whole - left, self.whole


def _fit_words(stage: str, site: str | None, step: int, steps: int | None, loss: float) -> str:
    where = f" {site.split('#')[0]}" if site else ""
    of = f"/{steps}" if steps else ""
    return f"{stage}{where} {step}{of} loss {loss:.4g}"


class _Lines:
    """One line when a stage begins: for logs and pipes."""

    def __init__(self, what: str, console: Console) -> None:
        self.what, self.console, self.last = what, console, ""

    def __call__(self, stage: str, *facts: Any) -> None:
        site = facts[0] if len(facts) > 2 and facts[0] else ""
        line = f"{self.what}: {stage}" + (f" {site}" if site else "")
        if line != self.last:
            self.last = line
            self.console.print(line, markup=False, highlight=False)
