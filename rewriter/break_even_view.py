"""Break-even as a table for the terminal and a picture: time against tokens, log-log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from rewriter.break_even import Curve
from rewriter.record import save_picture


def table(curves: Sequence[Curve]) -> Table:
    """Milliseconds by length, growth, and the number of tokens from which a form wins."""
    lengths = sorted({n for c in curves for n in c.seconds})
    made = Table(title="one attention, milliseconds (in brackets: times exact attention)")
    made.add_column("form")
    for tokens in lengths:
        made.add_column(f"{tokens}", justify="right")
    made.add_column("growth", justify="right")
    made.add_column("faster from", justify="right")
    for curve in curves:
        cells = [
            f"{curve.seconds[n] * 1e3:.3g} ({curve.seconds[n] / curve.exact[n]:.2f})"
            if n in curve.seconds
            else ""
            for n in lengths
        ]
        growth = "" if curve.growth is None else f"n^{curve.growth:.2f}"
        made.add_row(curve.form, *cells, growth, faster_from(curve))
    return made


def faster_from(curve: Curve) -> str:
    """In words."""
    if not curve.seconds:
        return "refused"
    if curve.form == "exact":
        return ""
    if curve.break_even is None:
        return f"not up to {max(curve.seconds)}"
    return f"{curve.break_even} tokens" if curve.break_even else f"{min(curve.seconds)} or less"


def picture(curves: Sequence[Curve], path: Path) -> None:
    """A PNG (or what the suffix says); `ArtifactError` where it can not be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 5.2), layout="constrained")
    axes = figure.subplots()
    shown = [c for c in curves if c.seconds]
    for index, curve in enumerate(shown):
        x, y = zip(*sorted(curve.seconds.items()), strict=True)
        lines = axes.plot(
            x, [s * 1e3 for s in y], marker="osD^v<>ph*X"[index % 11], markersize=4,
            linewidth=1.2, linestyle=("-", "--", ":")[index // 10 % 3], label=curve.form,
        )  # fmt: skip
        if curve.form == "exact":
            lines[0].set(color="#222222", linewidth=2.6, zorder=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({n for c in shown for n in c.seconds})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    save_picture(figure, path)
