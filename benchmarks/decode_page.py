"""The page and the plot of ``benchmarks.decode``: docs/decoding.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.plots import _figure, _save


def write_page(result: Mapping[str, Any], docs: Path) -> str:
    """Write docs/decoding.md and its picture; one line that sums them up."""
    image = plot(result, docs / "images")
    (docs / "decoding.md").write_text(page(result, image.relative_to(docs).as_posix()))
    return "; ".join(f"{form}: {text}" for form, text in kept(result).items())


def kept(result: Mapping[str, Any]) -> dict[str, str]:
    """By form: the pace at the last mark in parts of that at the first, from the best turns."""
    marks, told = result["marks"], {}
    for form, best in result["best_ms"].items():
        told[form] = f"{best[0] / best[-1]:.0%} of the pace at {marks[0]} tokens at {marks[-1]}"
    return told


def plot(result: Mapping[str, Any], folder: Path) -> Path:
    """Tokens a second against tokens generated."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = _figure(7.0, 4.4)
    for form, best in result["best_ms"].items():
        line = axes.plot(result["marks"], [1e3 / ms for ms in best], marker="o", label=form)
        median = [1e3 / ms for ms in result["median_ms"][form]]
        axes.plot(result["marks"], median, linestyle=":", color=line[0].get_color())
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens generated")
    axes.set_ylabel("tokens a second there (best; dotted: median)")
    axes.set_title(f"{result['model']}: pace of generating")
    axes.grid(which="major", linewidth=0.4)
    axes.legend(frameon=False)
    return _save(figure, folder / f"decode-{str(result['model']).replace('/', '-')}.svg")


def page(result: Mapping[str, Any], image: str) -> str:
    """The page's text."""
    machine = result["machine"]
    marks = result["marks"]
    lines = [
        "# Generating token by token",
        "",
        "Written by `python -m benchmarks.decode`. `compile --decode` makes an artifact that",
        "generates; linear forms keep sums of constant size, exact attention all keys and values.",
        "",
        f"Model `{result['model']}` (random weights), batch 1, {result['threads']} threads on "
        f"{machine['cpu']}; {len(result['rounds'])} rounds, the forms in turns. Tokens a second "
        "just before so many tokens: best turn (median).",
        "",
        f"| form | {' | '.join(str(m) for m in marks)} | kept |",
        f"|---|{'---|' * (len(marks) + 1)}",
    ]
    for form, best in result["best_ms"].items():
        cells = [
            f"{1e3 / b:.0f} ({1e3 / m:.0f})"
            for b, m in zip(best, result["median_ms"][form], strict=True)
        ]
        lines.append(f"| {form} | {' | '.join(cells)} | {best[0] / best[-1]:.0%} |")
    return "\n".join([*lines, "", f"![Pace of generating]({image})", ""])
