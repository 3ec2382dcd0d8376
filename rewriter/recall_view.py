"""Recall as a table for the terminal and a picture: accuracy against the number of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from rewriter.recall import Cell
from rewriter.record import save_picture


def table(cells: Sequence[Cell]) -> Table:
    """Forms by rows, numbers of pairs by columns."""
    made = Table(title="associative recall: share of questions answered right")
    pairs = sorted({c.pairs for c in cells})
    made.add_column("form")
    for count in pairs:
        made.add_column(f"{count} pairs", justify="right")
    for name in dict.fromkeys(c.form for c in cells):
        found = {c.pairs: c for c in cells if c.form == name}
        made.add_row(name, *(_text(found[n]) if n in found else "" for n in pairs))
    return made


def _text(cell: Cell) -> str:
    return "refused" if cell.accuracy is None else f"{cell.accuracy:.3f}"


def refusals(cells: Sequence[Cell]) -> list[str]:
    """Why forms are missing, each once."""
    return list(dict.fromkeys(c.why for c in cells if c.why))


def picture(cells: Sequence[Cell], path: Path) -> None:
    """A PNG (or what the suffix says); `ArtifactError` where it can not be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(dict.fromkeys(c.form for c in cells)):
        points = sorted((c.pairs, c.accuracy) for c in cells if c.form == name and not c.why)
        if points:
            x, y = zip(*points, strict=True)
            lines = axes.plot(x, y, marker="osD^v<>ph*"[index % 10], markersize=5, label=name)
            if name == "exact":
                lines[0].set(linewidth=2.4, color="#222222")
    axes.set_xscale("log", base=2)
    ticks = sorted({c.pairs for c in cells})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("pairs shown")
    axes.set_ylabel("questions answered right")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    save_picture(figure, path)
