"""Pictures of two-expert layers: the balance while they were trained, and where the tokens go.

Each is drawn once, from the plain data in `RewriteReport.experts`: as inline SVG for the page of a
report, and as a PNG by `save_pictures`. Grey is the multiply expert, blue the shift expert.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import ArtifactError, UsageError
from rewriter.moe_routing import GREYS
from rewriter.plots import AFTER, BEFORE, FAINT, INK, RULE, short, svg
from rewriter.record import save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rewriter.report import RewriteReport

Experts = Mapping[str, Any]
# What the markers of rewriter/plots.py are in a PNG: the page's light style.
PNG = {INK: "#1d2129", FAINT: "#5d6675", RULE: "#dfe2e8", BEFORE: "#9aa5b8", AFTER: "#2f6fde"}
MOST = 24  # maps of patches in one picture


def balance(experts: Experts, colours: Mapping[str, str] | None = None) -> Figure | None:
    """The loss that balances the experts and the share of tokens at shift, step by step.

    A dotted line is the share at which both experts take the same time (mean over the layers).
    None where nothing was trained.
    """
    rows = experts.get("training") or ()
    if not rows:
        return None
    paint = _paint(colours)
    figure = _figure(7.4, 3.6)
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in rows]
    above.plot(steps, [row["balance"] for row in rows], color=paint(AFTER), linewidth=1.6)
    above.set_ylabel("balance loss", color=paint(FAINT), fontsize=9)
    above.set_ylim(bottom=0)
    below.plot(steps, [row["shift"] for row in rows], color=paint(AFTER), linewidth=1.6)
    even = [_even(row) for row in experts.get("times") or ()]
    if even:
        wanted = sum(even) / len(even)
        below.axhline(wanted, color=paint(INK), linestyle=":", linewidth=1.2)
        below.annotate(
            "equal time", (steps[-1], wanted), xytext=(0, 8), textcoords="offset points",
            ha="right", fontsize=8.5, color=paint(FAINT),
        )  # fmt: skip
    below.set_ylim(0, 1)
    below.set_ylabel("tokens at shift", color=paint(FAINT), fontsize=9)
    below.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    below.set_xlabel("step of training", color=paint(FAINT), fontsize=9)
    for axes in (above, below):
        _plain(axes, paint)
    return figure


def shares(experts: Experts, colours: Mapping[str, str] | None = None) -> Figure | None:
    """Each layer's tokens: how many at multiply (grey) and at shift (blue).

    A dark mark is where both experts of the layer take the same time. None without routing.
    """
    rows = experts.get("routing") or ()
    if not rows:
        return None
    paint = _paint(colours)
    figure = _figure(7.4, 0.9 + 0.3 * len(rows))
    axes = figure.subplots()
    even = {i: 1 - _even(t) for t in experts.get("times") or () for i in t["layers"]}
    for at, row in enumerate(rows):
        total = max(1, row["multiply"] + row["shift"])
        first = row["multiply"] / total
        axes.barh(at, first, height=0.62, color=paint(BEFORE), label=_once("multiply", at))
        axes.barh(
            at, row["shift"] / total, left=first, height=0.62, color=paint(AFTER),
            label=_once("shift", at),
        )  # fmt: skip
        if row["layer"] in even:
            axes.vlines(even[row["layer"]], at - 0.4, at + 0.4, color=paint(INK), linewidth=1.6)
        axes.annotate(
            f"{row['multiply']} + {row['shift']}", (1.0, at), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8.5, color=paint(FAINT),
            annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), labels=[short(r["layer"]) for r in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("share of the tokens; counts at the end", color=paint(FAINT), fontsize=9)
    axes.legend(
        frameon=False, fontsize=9, labelcolor=paint(INK), loc="lower right", ncols=2,
        bbox_to_anchor=(1, 1),
    )  # fmt: skip
    _plain(axes, paint)
    return figure


def patches(experts: Experts, colours: Mapping[str, str] | None = None) -> Figure | None:
    """The first image, and for each layer a map of its patches: grey multiply, blue shift.

    At most `MOST` layers. None where the model takes no image.
    """
    rows = [r for r in experts.get("routing") or () if r.get("patches")][:MOST]
    if not rows:
        return None
    paint, image = _paint(colours), experts.get("image")
    cells = len(rows) + bool(image)
    wide = min(6, cells)
    figure = _figure(7.4, 1.45 * -(-cells // wide) + 0.1)
    grid = figure.subplots(-(-cells // wide), wide, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    if image:
        _squares(grid[0], image, lambda grey: str(grey / (GREYS - 1)))
        _title(grid[0], "image", paint)
    for axes, row in zip(grid[cells - len(rows) :], rows, strict=False):
        _squares(axes, row["patches"], lambda choice: paint(AFTER if choice else BEFORE))
        _title(axes, row["layer"], paint)
    return figure


def _squares(axes: Axes, table: Sequence[Sequence[int]], colour: Callable[[int], str]) -> None:
    """A table of values as squares; drawn as shapes so that the page's colours reach them."""
    from matplotlib.patches import Rectangle

    for y, line in enumerate(table):
        at = 0
        for value, run in itertools.groupby(line):
            wide = len(list(run))
            square = Rectangle((at, y), wide, 1, facecolor=colour(value), linewidth=0)
            square.set_antialiased(False)  # or seams show between neighbours
            axes.add_patch(square)
            at += wide
    axes.set_xlim(0, len(table[0]))
    axes.set_ylim(len(table), 0)
    axes.set_aspect("equal")


def _title(axes: Axes, name: str, paint: Callable[[str], str]) -> None:
    name = name if len(name) <= 18 else "…" + name[-17:]
    axes.set_title(name, fontsize=8.5, color=paint(FAINT), parse_math=False)


def _paint(colours: Mapping[str, str] | None) -> Callable[[str], str]:
    """The colour of a marker; the marker itself on a page, whose style replaces it."""
    return lambda marker: (colours or {}).get(marker, marker)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Axes, paint: Callable[[str], str]) -> None:
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(paint(RULE))
    axes.tick_params(axis="x", colors=paint(FAINT), labelsize=9)
    axes.tick_params(axis="y", colors=paint(INK), labelsize=9, length=0)
    axes.grid(axis="x", color=paint(RULE), linewidth=0.6)
    axes.set_axisbelow(True)


def _even(times: Mapping[str, Any]) -> float:
    """Share of the tokens at shift with which both experts take the same time."""
    total: float = times["multiply"] + times["shift"]
    return float(times["multiply"]) / total if math.isfinite(total) and total > 0 else 0.5


def _once(label: str, at: int) -> str:
    return label if at == 0 else "_" + label


PICTURES: Mapping[str, Callable[..., Figure | None]] = {
    "balance": balance,
    "shares": shares,
    "patches": patches,
}


def charts(report: RewriteReport) -> dict[str, str]:
    """{picture: SVG} for the page of a report, "" where there is nothing to show."""
    made = {}
    for name, draw in PICTURES.items():
        figure = draw(report.experts)
        made[name] = "" if figure is None else svg(figure, f"moe {name}")
    return made


def save_pictures(report: RewriteReport, folder: Path) -> list[Path]:
    """Write moe-balance.png, moe-shares.png and moe-patches.png, those there is something for.

    Args:
        report: of a rewrite with `linear="moe"`; the balance needs a training, the map of patches
            a model that takes an image.
        folder: made if it is missing.

    Returns:
        The files written.

    Raises:
        UsageError: the report has no two-expert layer. ArtifactError: a file can not be written.
    """
    if not report.experts.get("routing"):
        raise UsageError(
            "report: has no two-expert layers to draw; rewrite the model with --linear moe"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{folder}: can not be made ({error.strerror})") from error
    written = []
    for name, draw in PICTURES.items():
        figure = draw(report.experts, PNG)
        if figure is not None:
            written.append(folder / f"moe-{name}.png")
            save_picture(figure, written[-1])
    return written
