"""Names at the right ends of the lines of a picture, so that none covers another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# By the family of the form; dark enough for text on white.
COLOURS: Mapping[str, str] = {
    "exact": "#222222",
    "kernelised": "#1f66b0",
    "sparse": "#c8590a",
    "hashing": "#1b8a4b",
    "low-rank": "#8a3fa8",
}
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
SIZE = 8  # points


@dataclass(frozen=True)
class Line:
    """One line: its name, its points, the family that gives the colour, how its dashes are."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    family: str
    style: Any = "-"

    def draw(self, axes: Axes) -> None:
        """The line with its points; exact attention is the thick one."""
        first = self.name == "exact"
        axes.plot(
            self.x, self.y, color=colour(self.family), linestyle=self.style, marker="o",
            markersize=3, linewidth=3.0 if first else 1.2, zorder=4 if first else 2,
        )  # fmt: skip


def colour(family: str) -> str:
    """Of a family; grey for one that is not in the table."""
    return COLOURS.get(family, "#777777")


def lines_of(points: Mapping[str, Mapping[int, float]]) -> list[Line]:
    """By form (name -> x -> y), in the order given: coloured by family, the members of a family
    told apart by their dashes."""
    from passes.form import forms

    known, seen, made = forms(), dict[str, int](), []
    for name, own in points.items():
        family = known[name].family if name in known else ""
        turn = seen[family] = seen.get(family, -1) + 1
        style = "-" if name == "exact" else STYLES[turn % len(STYLES)]
        made.append(Line(name, sorted(own), [own[x] for x in sorted(own)], family, style))
    return made


def spread(
    wanted: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf
) -> list[float]:
    """Places in ascending order, at least `gap` apart, with the least squared distance to `wanted`
    (ascending): neighbours that are too close share the mean of what they want. All are from `low`
    to `high`, or above it where there is no room."""
    groups: list[tuple[float, int]] = []  # (sum of wanted places less their offsets, members)
    for index, place in enumerate(wanted):
        total, members = place - index * gap, 1
        while groups and groups[-1][0] / groups[-1][1] > total / members:
            before, count = groups.pop()
            total, members = total + before, members + count
        groups.append((total, members))
    level = [total / members for total, members in groups for _ in range(members)]
    top = high - (len(level) - 1) * gap
    return [max(low, min(place, top)) + index * gap for index, place in enumerate(level)]


def name_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each name right of its line's last point, and lead from one to the other.

    Scales and limits of `axes` must be set before.
    """
    height = axes.get_figure(root=True).get_figheight() * 72 * 0.85  # type: ignore[union-attr]
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [(float(to_axes.transform((line.x[-1], line.y[-1]))[1]), line) for line in lines]
    ends.sort(key=lambda end: end[0])
    places = spread([at for at, _ in ends], 1.2 * SIZE / height, 0.0, 1.0)
    for place, (_, line) in zip(places, ends, strict=True):
        axes.annotate(
            line.name, (line.x[-1], line.y[-1]), (1.07, place), textcoords=axes.transAxes,
            color=colour(line.family), fontsize=SIZE, va="center", annotation_clip=False,
            fontweight="bold" if line.name == "exact" else "normal",
            arrowprops={"arrowstyle": "-", "color": colour(line.family), "linewidth": 0.5,
                        "shrinkA": 1, "shrinkB": 3, "relpos": (0.0, 0.5)},
        )  # fmt: skip


def family_legend(
    axes: Axes, lines: Sequence[Line], place: Literal["upper left", "lower left"]
) -> None:
    """What the colours mean, for the families that are shown."""
    from matplotlib.lines import Line2D

    shown = {line.family for line in lines}
    keys = [Line2D([], [], color=c, linewidth=2, label=f) for f, c in COLOURS.items() if f in shown]
    axes.legend(handles=keys, frameon=False, loc=place, fontsize=SIZE + 1)
