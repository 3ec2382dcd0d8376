"""Charts of a report as inline SVG (matplotlib): site errors, latency, operations, energy.

Figures are drawn in marker colours that are then replaced by CSS variables, so they follow the
page's light and dark style; text stays text. Values that are not finite get a word, not a bar.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from passes.site import SiteStatus
from rewriter.wording import count, milliseconds, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rewriter.report import RewriteReport

# Marker colour -> CSS variable of templates/style.css.j2.
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--rule)",
    "#040404": "var(--before)",
    "#050505": "var(--after)",
    "#060606": "var(--bad)",
}
INK, FAINT, RULE, BEFORE, AFTER, BAD = COLOURS
LONGEST = 46  # letters of a site's id shown beside its bar


def _figure(rows: float, width: float = 7.4) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 0.75 + 0.3 * rows), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(axis="x", colors=FAINT, labelsize=9)
    axes.tick_params(axis="y", colors=INK, labelsize=9, length=0)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def svg(figure: Figure, name: str) -> str:
    """The figure as one <svg> element without fixed size, named for readers of the page."""
    import matplotlib

    buffer = io.StringIO()
    # Ids inside the SVG are hashed with the name, so two figures of a page do not share any.
    salt = hashlib.sha256(name.encode()).hexdigest()[:12]
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": salt}
    with matplotlib.rc_context(settings):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for marker, variable in COLOURS.items():
        text = text.replace(marker, variable)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = _own_ids(text, salt)
    text = re.sub(r"font(-family)?: ([^;\"]*)", _plain_font, text)
    return re.sub(r'(<svg[^>]*?) (?:height|width)="([^"]*)"', _sized, text, count=1)


def _own_ids(text: str, salt: str) -> str:
    """Only ids that something refers to stay, and they begin with the figure's own salt."""
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(
        r' ?\bid="([^"]*)"',
        lambda m: f' id="f{salt}-{m.group(1)}"' if m.group(1) in wanted else "",
        text,
    )
    return re.sub(r'((?:href="|url\()#)([^")]+)', rf"\1f{salt}-\2", text)


def _plain_font(match: re.Match[str]) -> str:
    if match.group(1):
        return "font-family: inherit"
    size = re.search(r"[\d.]+px", match.group(2))
    return f"font-size: {size.group(0)}" if size else "font-size: 10px"


def _sized(match: re.Match[str]) -> str:
    return f'{match.group(1)} class="chart"'


def short(site_id: str) -> str:
    """A site's id that fits beside a bar: the end is kept, as it tells sites apart."""
    return site_id if len(site_id) <= LONGEST else "…" + site_id[-(LONGEST - 1) :]


def _labels(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), labels=[str(n) for n in names], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _legend(axes: Axes) -> None:
    legend = axes.legend(
        frameon=False, fontsize=9, labelcolor=INK, loc="lower right", bbox_to_anchor=(1, 1), ncols=3
    )
    legend.set_in_layout(True)


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _word(axes: Axes, y: float, text: str, colour: str = FAINT, x: float = 0.0) -> None:
    axes.annotate(
        text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5,
        color=colour, parse_math=False, annotation_clip=False,
    )  # fmt: skip


def site_errors(report: RewriteReport) -> str:
    """Relative error of each approximate site, before and after the fit; "" if none measured."""
    rows = [r for r in report.sites if (r.error_before_fit, r.error_after_fit) != (None, None)]
    if not rows:
        return ""
    figure, axes = _figure(len(rows) * 1.35)
    undone = {r.site.id: " (reverted)" for r in rows if r.status is SiteStatus.REVERTED}
    _labels(axes, [short(r.site.id) + undone.get(r.site.id, "") for r in rows])
    fitted = any(r.error_after_fit is not None for r in rows)
    pairs = [("before fit", "error_before_fit", BEFORE, -0.2)]
    pairs += [("after fit", "error_after_fit", AFTER, 0.2)] if fitted else []
    for label, name, colour, shift in pairs:
        values = [getattr(r, name) for r in rows]
        shown = [v if _finite(v) else 0.0 for v in values]
        places = [i + (shift if fitted else 0) for i in range(len(rows))]
        axes.barh(places, shown, height=0.36 if fitted else 0.6, color=colour, label=label)
        for y, value in zip(places, values, strict=True):
            bad = value is not None and not _finite(value)
            _word(axes, y, number(value), BAD if bad else FAINT, value if _finite(value) else 0.0)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    if not any(_finite(getattr(r, name)) for r in rows for _, name, _, _ in pairs):
        axes.set_xticks([])
    axes.set_xlabel("relative error of the site's output", color=FAINT, fontsize=9)
    _legend(axes)
    return svg(figure, "errors")


def latency(report: RewriteReport) -> str:
    """Median and interquartile range of each engine; "" if nothing was timed."""
    rows = [r for r in (report.timings or {}).get("engines", ()) if _finite(r.get("median_ms"))]
    if not rows:
        return ""
    rows = sorted(rows, key=lambda r: r["median_ms"])
    figure, axes = _figure(len(rows) * 1.25)
    _labels(axes, [r.get("label") or r["engine"] for r in rows])
    for y, row in enumerate(rows):
        colour = AFTER if row["engine"] == "ours" else BEFORE
        low, high = row.get("q1_ms"), row.get("q3_ms")
        axes.barh(y, row["median_ms"], height=0.6, color=colour)
        top = row["median_ms"]
        if _finite(low) and _finite(high):
            axes.hlines(y, low, high, color=INK, linewidth=1.4)
            axes.vlines([low, high], y - 0.13, y + 0.13, color=INK, linewidth=1.4)
            top = max(top, high)
        _word(axes, y, milliseconds(row["median_ms"]), INK, top)
    axes.margins(x=0.14)
    axes.set_xlabel(
        "milliseconds a call: median, line = middle half of the runs", color=FAINT, fontsize=9
    )
    return svg(figure, "latency")


def site_latency(report: RewriteReport) -> str:
    """Milliseconds of each site, exact and as it stands; "" if not measured."""
    rows = [r for r in report.sites if _finite(r.ms_before) and _finite(r.ms_after)]
    if not rows:
        return ""
    figure, axes = _figure(len(rows) * 1.35)
    _labels(axes, [short(r.site.id) for r in rows])
    for label, name, colour, shift in (
        ("exact attention", "ms_before", BEFORE, -0.2),
        ("as it stands", "ms_after", AFTER, 0.2),
    ):
        values = [getattr(r, name) for r in rows]
        places = [i + shift for i in range(len(rows))]
        axes.barh(places, values, height=0.36, color=colour, label=label)
        for y, value in zip(places, values, strict=True):
            _word(axes, y, milliseconds(value), FAINT, value)
    axes.margins(x=0.14)
    axes.set_xlabel("milliseconds", color=FAINT, fontsize=9)
    _legend(axes)
    return svg(figure, "site latency")


def paired(
    name: str,
    labels: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    axis: str,
    unit: str = "",
) -> str:
    """Two bars a label (exact attention, as it stands), with counts at their ends."""
    figure, axes = _figure(len(labels) * 1.35)
    _labels(axes, labels)
    for label, values, colour, shift in (
        ("exact attention", before, BEFORE, -0.2),
        ("as it stands", after, AFTER, 0.2),
    ):
        places = [i + shift for i in range(len(labels))]
        axes.barh(places, values, height=0.36, color=colour, label=label)
        for y, value in zip(places, values, strict=True):
            _word(axes, y, f"{count(value)}{unit}".strip() if value else "none", FAINT, value)
    axes.margins(x=0.16)
    axes.xaxis.set_major_formatter(lambda value, _: count(value).strip() if value else "0")
    axes.set_xlabel(axis, color=FAINT, fontsize=9)
    _legend(axes)
    return svg(figure, name)


def operations(report: RewriteReport) -> str:
    """Operations of all counted sites by kind, before and after; "" if nothing was counted."""
    before, after = counts(report)
    kinds = [k for k in {**before, **after} if before.get(k, 0) + after.get(k, 0) > 0]
    if not kinds:
        return ""
    kinds.sort(key=lambda k: -(before.get(k, 0) + after.get(k, 0)))
    return paired(
        "operations",
        kinds,
        [before.get(k, 0) for k in kinds],
        [after.get(k, 0) for k in kinds],
        "operations",
    )


def counts(report: RewriteReport) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Operations by kind over all sites with a count, before and after."""
    totals: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for row in report.sites:
        if row.ops_before is None or row.ops_after is None:
            continue
        for total, ops in zip(totals, (row.ops_before, row.ops_after), strict=True):
            for op, _, n in ops:
                total[op] = total.get(op, 0) + n
    return totals
