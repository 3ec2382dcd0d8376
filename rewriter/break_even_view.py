"""Break-even as a table, a page of docs/ and a picture: time against tokens, log-log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
        cells = [_cell(curve, n) for n in lengths]
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


def page(data: Mapping[str, Any], curves: Sequence[Curve], image: str) -> str:
    """The text of docs/break-even.md from a record and the path of its picture."""
    key = data["key"]
    shape, machine = key["shape"], key["machine"]
    lengths = sorted({n for c in curves for n in c.seconds})
    lines = [
        "# From how many tokens on a form is faster",
        "",
        "Written by `python -m rewriter.docs` from rewriter/records/break_even.json, which",
        "`rewriter forms all --break-even --record rewriter/records/break_even.json` makes.",
        "",
        f"One attention alone, compiled for `{key['target']['name']}`: batch 1, {shape['heads']} "
        f"heads of {shape['width']}, {'causal' if shape['causal'] else 'no mask'}, float32, random "
        f"inputs, {machine['usable_cores']} cores of {machine['cpu']}. Form and exact attention "
        "take turns; medians. Projections and the rest of a model are not in it, and how well a "
        "form does is not either (docs/forms.md).",
        "",
        "Milliseconds, and in brackets the time in parts of exact attention's beside it.",
        "**Growth** is the exponent between the two longest lengths (1 is linear, 2 quadratic).",
        "",
        f"| form | {' | '.join(f'{n:,}' for n in lengths)} | growth | faster from |",
        f"|---|{'---:|' * (len(lengths) + 2)}",
    ]
    for curve in sorted((c for c in curves if c.seconds), key=_order):
        growth = "" if curve.growth is None else f"{curve.growth:.2f}"
        cells = " | ".join(_cell(curve, n) for n in lengths)
        lines.append(f"| {curve.form} | {cells} | {growth} | {faster_from(curve)} |")
    lines += ["", *(f"- `{c.form}`: {c.why}" for c in curves if c.why)]
    return "\n".join([*lines, "", f"![Time against tokens]({image})", ""])


def _order(curve: Curve) -> tuple[bool, int, str]:
    """Exact attention, then those that win earliest."""
    even = curve.break_even
    return curve.form != "exact", 2**62 if even is None else even, curve.form


def _cell(curve: Curve, tokens: int) -> str:
    if tokens not in curve.seconds:
        return ""
    seconds = curve.seconds[tokens]
    return f"{seconds * 1e3:.3g} ({seconds / curve.exact[tokens]:.2f})"


def picture(curves: Sequence[Curve], path: Path) -> None:
    """Milliseconds, and the time in parts of exact attention's, against tokens; a PNG (or what the
    suffix says). `ArtifactError` where it can not be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 6.4), layout="constrained")
    times, parts = figure.subplots(1, 2)
    shown = [c for c in curves if c.seconds]
    for index, curve in enumerate(sorted(shown, key=_last, reverse=True)):
        x = sorted(curve.seconds)
        look: dict[str, Any] = {
            "marker": "osD^v<>ph*X"[index % 11], "markersize": 4, "linewidth": 1.2,
            "linestyle": ("-", "--", ":")[index // 10 % 3], "label": curve.form,
        }  # fmt: skip
        if curve.form == "exact":
            look |= {"color": "#222222", "linewidth": 2.6, "linestyle": "-", "zorder": 5}
        times.plot(x, [curve.seconds[n] * 1e3 for n in x], **look)
        if curve.form != "exact":
            look["color"] = times.lines[-1].get_color()
            parts.plot(x, [curve.seconds[n] / curve.exact[n] for n in x], **look)
    parts.axhline(1.0, color="#222222", linewidth=2.6)
    ticks = sorted({n for c in shown for n in c.seconds})
    for axes, label in ((times, "milliseconds"), (parts, "time in parts of exact attention's")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    names = times.get_legend_handles_labels()
    figure.legend(*names, frameon=False, loc="outside right center", fontsize=8)
    save_picture(figure, path)


def _last(curve: Curve) -> float:
    """Time in parts of exact attention's at the longest length."""
    tokens = max(curve.seconds)
    return curve.seconds[tokens] / curve.exact[tokens]
