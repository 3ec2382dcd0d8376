"""An energy report for people: a table for the terminal, a picture, a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rewriter.energy import KINDS, Cost, EnergyReport, LayerCost
from rewriter.wording import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

MOST = 28  # bars of a picture; further layers are summed in the last one
BEFORE, AFTER, INK, FAINT = "#8a94a6", "#2f7d5b", "#1c2430", "#5b6575"


def table(report: EnergyReport) -> RenderableType:
    """Every layer that is charged, then the totals; layers that did not change are in grey."""
    from rich.table import Table

    names = [layer.name for layer in report.layers]
    cut = _common(names)
    title = f"{report.model}: operations and energy by {report.rule!r}"
    made = Table(title=title, caption=f"names after {cut!r}" if cut else None)
    made.add_column("layer", overflow="fold")
    made.add_column("kind", overflow="fold")
    for word in ("ops", "mJ"):
        for side in ("before", "after"):
            made.add_column(f"{word} {side}", justify="right", min_width=7)
    for layer in report.layers:
        style = "dim" if layer.before == layer.after else ""
        kind = f"{layer.kind}: {layer.form}" if layer.form else layer.kind
        cells = (*_short(layer.before, layer.after),)
        made.add_row(layer.name.removeprefix(cut), kind, *cells, style=style)
    made.add_section()
    made.add_row("all", "", *_short(report.before, report.after), style="bold")
    return made


def _common(names: Sequence[str]) -> str:
    """The dotted prefix all names but a few share, "" if there is none."""
    heads = [n.split(".") for n in names if "." in n]
    if len(heads) < 0.8 * len(names):
        return ""
    shared = []
    for parts in zip(*heads, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) + "." if shared else ""


def _short(before: Cost | None, after: Cost | None) -> list[str]:
    totals = [count(c.ops.total()).strip() if c else "" for c in (before, after)]
    return [*totals, *(f"{c.energy_mj:.3g}" if c else "" for c in (before, after))]


def _cells(cost: Cost | None) -> tuple[str, str, str]:
    if cost is None:
        return "", "", ""
    mul, add = (count(cost.ops.total(kind)).strip() or "0" for kind in ("mul", "add"))
    return mul, add, f"{cost.energy_mj:.4g}"


def figure(report: EnergyReport) -> Figure:
    """Totals by operation on top, the layers with the most energy below, before and after."""
    from matplotlib.figure import Figure

    rows = top_layers(report.layers)
    made = Figure(figsize=(8.6, 2.2 + 0.34 * len(rows)), layout="constrained")
    made.suptitle(f"{report.model}: {_headline(report)}", color=INK, fontsize=11)
    top, below = made.subplots(2, 1, height_ratios=[max(2.0, 0.07 * len(rows)), len(rows) * 0.34])
    totals = [("all", report.before.energy_mj, report.after.energy_mj)]
    totals += [(k, _of(report.before, k), _of(report.after, k)) for k in KINDS]
    _bars(top, [t for t in totals if t[1] or t[2]])
    _bars(below, rows)
    below.set_xlabel("millijoules", color=FAINT, fontsize=9)
    top.legend(frameon=False, fontsize=9, loc="lower right", labelcolor=INK)
    return made


def _headline(report: EnergyReport) -> str:
    text = f"{report.before.energy_mj:.4g} mJ"
    if report.before != report.after:
        text += f" → {report.after.energy_mj:.4g} mJ"
    return f"{text} (estimate, rule {report.rule!r})"


def _of(cost: Cost, kind: str) -> float:
    from passes.opcount import OpCount
    from rewriter.energy import price

    ops = {key: n for key, n in cost.ops.ops.items() if key[0] == kind}
    return price(OpCount(ops)).energy_mj


def top_layers(layers: Sequence[LayerCost], most: int = MOST) -> list[tuple[str, float, float]]:
    """(name, before, after) in mJ of the costliest layers in order, the rest as one row."""
    values = [
        (x.name, x.before.energy_mj if x.before else 0.0, x.after.energy_mj if x.after else 0.0)
        for x in layers
    ]
    if len(values) <= most:
        return values
    kept = set(sorted(range(len(values)), key=lambda i: -max(values[i][1:]))[: most - 1])
    rest = [v for i, v in enumerate(values) if i not in kept]
    shown = [v for i, v in enumerate(values) if i in kept]
    name = f"{len(rest)} more layers"
    return [*shown, (name, sum(v[1] for v in rest), sum(v[2] for v in rest))]


def _bars(axes: object, rows: Sequence[tuple[str, float, float]]) -> None:
    from matplotlib.axes import Axes

    from rewriter.plots import short

    assert isinstance(axes, Axes)
    for label, place, colour, shift in (("before", 1, BEFORE, -0.2), ("after", 2, AFTER, 0.2)):
        values = [row[place] for row in rows]
        at = [i + shift for i in range(len(rows))]
        axes.barh(at, values, height=0.36, color=colour, label=label)
        for y, value in zip(at, values, strict=True):
            word = f" {value:.3g}" if value else " none"
            axes.text(float(value), float(y), word, va="center", fontsize=7, color=FAINT)
    axes.set_yticks(range(len(rows)), labels=[short(r[0]) for r in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", linewidth=0.5, color="#d5dae3")
    axes.set_axisbelow(True)


def chart_png(report: EnergyReport, path: Path) -> None:
    """Write the picture as a PNG."""
    figure(report).savefig(path, dpi=150, facecolor="white", format="png")


def page(report: EnergyReport) -> str:
    """One self-contained HTML page: the sentences, the picture, the table of layers."""
    import io

    picture = io.StringIO()
    figure(report).savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    svg = picture.getvalue()
    heads = "".join(
        f"<th>{w} {side}</th>" for side in ("before", "after") for w in ("mul", "add", "mJ")
    )
    rows = "\n".join(
        _html_row(x.name, f"{x.kind} {x.form}", x.before, x.after) for x in report.layers
    )
    total = _html_row("all", "", report.before, report.after)
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>Energy of {escape(report.model)}</title><style>{_STYLE}</style>"
        f"<h1>Energy of {escape(report.model)}</h1><p>{escape(report.summary())}</p>{notes}"
        f"<p class='faint'>{escape(report.source)}</p>{svg[svg.index('<svg') :]}"
        f"<table><tr><th>layer</th><th>kind</th>{heads}</tr>{rows}{total}</table></html>"
    )


def _html_row(name: str, kind: str, before: Cost | None, after: Cost | None) -> str:
    cells = "".join(f"<td class='n'>{escape(c)}</td>" for c in (*_cells(before), *_cells(after)))
    same = " class='faint'" if before == after else ""
    return f"<tr{same}><td>{escape(name)}</td><td>{escape(kind.strip())}</td>{cells}</tr>"


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;"
    "color:#1c2430}svg{max-width:100%;height:auto}table{border-collapse:collapse;font-size:13px}"
    "td,th{padding:2px 8px;text-align:left;border-bottom:1px solid #e3e7ee}"
    ".n{text-align:right;font-variant-numeric:tabular-nums}.faint{color:#5b6575}"
)
