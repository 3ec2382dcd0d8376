"""Recall as a table for the terminal and a picture: accuracy against the number of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from rewriter.recall import Cell, scores
from rewriter.record import save_picture


def table(cells: Sequence[Cell]) -> Table:
    """Forms by rows, numbers of pairs by columns: means over the seeds at each form's best rate."""
    made = Table(title="associative recall: share of questions answered right")
    pairs = sorted({c.pairs for c in cells})
    made.add_column("form")
    for count in pairs:
        made.add_column(f"{count} pairs", justify="right")
    found = {(s.form, s.pairs): f"{s.mean:.3f}" for s in scores(cells)}
    for name in dict.fromkeys(c.form for c in cells):
        made.add_row(name, *(found.get((name, n), "refused") for n in pairs))
    return made


def refusals(cells: Sequence[Cell]) -> list[str]:
    """Why forms are missing, each once."""
    return list(dict.fromkeys(c.why for c in cells if c.why))


def picture(cells: Sequence[Cell], path: Path) -> None:
    """A PNG (or what the suffix says); `ArtifactError` where it can not be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    axes = figure.subplots()
    told = scores(cells)
    lines = {name: [s for s in told if s.form == name] for name in {s.form for s in told}}
    ordered = sorted(lines, key=lambda n: (-sum(s.mean for s in lines[n]), n))
    for index, name in enumerate(ordered):
        x, y = [s.pairs for s in lines[name]], [s.mean for s in lines[name]]
        marker, style = "osD^v<>ph*"[index % 10], ("-", "--", ":")[index // 10 % 3]
        (line,) = axes.plot(x, y, style, marker=marker, markersize=4, linewidth=1.3, label=name)
        if name == "exact":
            line.set(linewidth=2.8, color="#222222")
    axes.set_xscale("log", base=2)
    ticks = sorted({c.pairs for c in cells})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("pairs shown")
    axes.set_ylabel("questions answered right")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    save_picture(figure, path)
