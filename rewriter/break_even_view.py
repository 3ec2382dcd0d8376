"""Break-even as a table, a page of docs/ and a picture: time against tokens, log-log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rewriter.break_even import LEVEL, Curve
from rewriter.line_labels import family_legend, lines_of, name_ends
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
    if curve.level:
        return "level"
    if curve.break_even is None:
        return f"not up to {max(curve.seconds):,}"
    return f"{curve.break_even:,}" if curve.break_even else f"{min(curve.seconds):,} or less"


def page(data: Mapping[str, Any], curves: Sequence[Curve], image: str) -> str:
    """The text of docs/break-even.md from a record and the path of its picture."""
    key = data["key"]
    shape, machine = key["shape"], key["machine"]
    lengths = sorted({n for c in curves for n in c.seconds})
    lines = [
        "# From how many tokens on a form is faster",
        "",
        "Written by `python -m rewriter.docs` from rewriter/records/break_even.json, which",
        f"`rewriter forms all --break-even --lengths {','.join(map(str, lengths))} "
        "--record rewriter/records/break_even.json` makes.",
        "",
        f"One attention alone, compiled for `{key['target']['name']}`: batch 1, {shape['heads']} "
        f"heads of {shape['width']}, {'causal' if shape['causal'] else 'no mask'}, float32, random "
        f"inputs, {key['threads']} threads on {machine['usable_cores']} cores of {machine['cpu']}. "
        "Form and exact attention take turns; medians. Projections and the rest of a model are "
        "not in it, and how well a form does is not either (docs/forms.md).",
        "",
        "Milliseconds, and in brackets the time in parts of exact attention's beside it.",
        "**Growth** is the exponent between the two longest lengths (1 is linear, 2 quadratic).",
        "**Faster from** is in tokens, interpolated; `level` means less than "
        f"{LEVEL * 100:.0f} % apart at the longest length.",
        "",
        f"| form | {' | '.join(f'{n:,}' for n in lengths)} | growth | faster from |",
        f"|---|{'---:|' * (len(lengths) + 2)}",
    ]
    for curve in sorted((c for c in curves if c.seconds), key=_order):
        growth = "" if curve.growth is None else f"{curve.growth:.2f}"
        cells = " | ".join(_cell(curve, n) for n in lengths)
        lines.append(f"| {curve.form} | {cells} | {growth} | {faster_from(curve)} |")
    moved = 16 * shape["heads"] * shape["width"] * lengths[-1] / 1e6
    lines += [
        "",
        f"At {lengths[-1]:,} tokens q, k, v and the output take {moved:,.0f} MB. Growth above 2, "
        "or well above 1 of the cheapest forms, is probably memory and not work: what they read no "
        "longer stays in the caches. (Not tested apart.)",
    ]
    if why := [f"- `{c.form}`: {c.why}" for c in curves if c.why]:
        lines += ["", *why]
    return "\n".join([*lines, "", f"![Time against tokens]({image})", ""])


def _order(curve: Curve) -> tuple[bool, int, str]:
    """Exact attention, then those that win earliest, those that are level, those that lose."""
    even = curve.break_even
    last = 2**61 if curve.level else 2**62
    return curve.form != "exact", last if even is None else even, curve.form


def _cell(curve: Curve, tokens: int) -> str:
    if tokens not in curve.seconds:
        return ""
    milliseconds, part = curve.seconds[tokens] * 1e3, _part(curve, tokens)
    told = f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"
    return f"{told} ({part:.2f})" if part >= 0.1 else f"{told} ({part:.2g})"


def picture(curves: Sequence[Curve], path: Path) -> None:
    """Milliseconds, and the time in parts of exact attention's, against tokens, both axes
    logarithmic; a PNG (or what the suffix says). `ArtifactError` where it can not be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 8.0), layout="constrained")
    times, parts = figure.subplots(1, 2, width_ratios=(2, 3))
    shown = sorted((c for c in curves if c.seconds), key=_last, reverse=True)
    took = lines_of({c.form: {n: s * 1e3 for n, s in c.seconds.items()} for c in shown})
    shares = lines_of({c.form: {n: _part(c, n) for n in c.seconds} for c in shown})
    ticks = sorted({n for c in shown for n in c.seconds})
    for axes, lines, label in (
        (times, took, "milliseconds"),
        (parts, shares, "time in parts of exact attention's"),
    ):
        for line in lines:
            line.draw(axes)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    family_legend(times, took, "upper left")
    name_ends(parts, shares)
    save_picture(figure, path)


def _last(curve: Curve) -> float:
    """Time in parts of exact attention's at the longest length."""
    return _part(curve, max(curve.seconds))


def _part(curve: Curve, tokens: int) -> float:
    return 1.0 if curve.form == "exact" else curve.seconds[tokens] / curve.exact[tokens]
