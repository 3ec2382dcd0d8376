"""The page of a report: one self-contained HTML file, no scripts, nothing loaded from outside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from codegen.energy import HOROWITZ_45NM, energy
from passes.opcount import OpCount
from passes.site import SiteStatus
from rewriter import moe_plots, plots
from rewriter.graph_svg import draw
from rewriter.wording import busy, count, milliseconds, number, speed_words, verdict_text

if TYPE_CHECKING:
    from rewriter.report import RewriteReport

Chart = Markup | str


@dataclass(frozen=True)
class Card:
    """One headline number; `mood` is "good", "bad" or "" and colours it."""

    title: str
    value: str
    detail: str
    mood: str = ""


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rewriter"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, ms=milliseconds, count=count, verdict=verdict_text, breakable=breakable
    )
    return environment


def breakable(text: str) -> Markup:
    """Escaped text that may break a line after a dot, slash or underscore."""
    safe = str(escape(text))
    for mark in (".", "/", "_"):
        safe = safe.replace(mark, f"{mark}<wbr>")
    return Markup(safe)


def page(report: RewriteReport) -> str:
    """The whole page; every text of the report is escaped."""
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            cards=cards(report),
            warnings=warnings(report),
            graphs=_graphs(report),
            charts={
                name: Markup(draw_chart(report))
                for name, draw_chart in (
                    ("errors", plots.site_errors),
                    ("latency", plots.latency),
                    ("site_latency", plots.site_latency),
                    ("operations", plots.operations),
                    ("energy", energy_chart),
                )
            },
            experts={name: Markup(drawn) for name, drawn in moe_plots.charts(report).items()},
            engines=(report.timings or {}).get("engines", ()),
            ops_ratio=_ops_ratio,
            energy_source=HOROWITZ_45NM.source,
            unpriced=_unpriced(report),
            statuses=[str(s) for s in SiteStatus],
        )
    )


def cards(report: RewriteReport) -> list[Card]:
    """The headline numbers, only those that were measured."""
    done = f"{report.sites_rewritten} of {report.sites_found}"
    made = [Card("attention sites rewritten", done, _forms(report))]
    for maker in (_fidelity_card, _compiled_card, _speed_card, _ops_card):
        card = maker(report)
        if card is not None:
            made.append(card)
    return made


def _forms(report: RewriteReport) -> str:
    forms: dict[str, int] = {}
    for row in report.sites:
        if row.status is SiteStatus.REWRITTEN:
            forms[row.form] = forms.get(row.form, 0) + 1
    return ", ".join(f"{n} × {form}" for form, n in forms.items()) or "all as they were"


def _fidelity_card(report: RewriteReport) -> Card | None:
    if not report.fidelity or report.fidelity.get("cosine_mean") is None:
        return None
    cosine = report.fidelity["cosine_mean"]
    detail = "mean cosine of rewritten and original outputs (1 = the same direction)"
    unfitted = ((report.fit or {}).get("fidelity_before") or {}).get("cosine_mean")
    if unfitted is not None:
        detail += f"; {number(unfitted, 4)} before the fit"
    mood = "" if math.isfinite(cosine) else "bad"
    return Card("likeness to the original", number(cosine, 4), detail, mood)


def _compiled_card(report: RewriteReport) -> Card | None:
    stats = report.compiled
    if stats is None:
        return None
    ok = bool(stats.get("ok"))
    within = "within" if ok else "OUTSIDE"
    detail = f"largest difference of compiled and rewritten; {within} the allowed "
    allowed = number(stats.get("tolerance"))
    return Card(
        "compiled code error",
        number(stats.get("max_abs")),
        detail + allowed,
        "good" if ok else "bad",
    )


def _speed_card(report: RewriteReport) -> Card | None:
    times = report.times()
    if "ours" not in times or "eager" not in times:
        return None
    ratio = times["eager"] / times["ours"] if times["ours"] > 0 else math.nan
    threads = (report.timings or {}).get("threads")
    detail = (
        f"{milliseconds(times['ours'])} against {milliseconds(times['eager'])}, {threads} threads"
    )
    return Card(
        f"{speed_words(ratio).split(' ', 1)[-1]} eager PyTorch",
        f"{ratio if ratio >= 1 else 1 / ratio:.2f}×" if ratio > 0 else "?",
        detail,
        "good" if report.faster else "bad",
    )


def _ops_card(report: RewriteReport) -> Card | None:
    before, after = plots.counts(report)
    if not before or not sum(after.values()):
        return None
    ratio = sum(before.values()) / sum(after.values())
    if 0.995 < ratio < 1.005:
        return None
    word = "fewer" if ratio > 1 else "MORE"
    value = f"{max(ratio, 1 / ratio):.2f}×"
    return Card(f"{word} operations in attention", value, "counted in closed form over all sites")


def warnings(report: RewriteReport) -> list[str]:
    """What a reader must not miss."""
    found = []
    if report.compiled is not None and not report.compiled.get("ok"):
        found.append(
            f"The compiled code is outside its tolerance. {report.compiled.get('why', '')}"
        )
    if report.faster is False:
        found.append("The compiled model is NOT faster than eager PyTorch on this machine.")
    others = [e for e in report.beaten_by if e != "eager"]
    if others:
        found.append(f"Faster than the compiled model in the same run: {', '.join(others)}.")
    if busy(report):
        found.append("The machine was busy while the engines were timed: the times are doubtful.")
    failed = [r.site.id for r in report.sites if r.status is SiteStatus.FAILED]
    if failed:
        found.append(f"Sites that failed: {', '.join(failed)}.")
    if report.approximate and not report.fidelity:
        found.append("Sites are approximated, and the likeness to the original was not measured.")
    return found


def _graphs(report: RewriteReport) -> dict[str, Chart]:
    graph = report.graph or {}
    if not graph.get("before") or not graph.get("after"):
        return {}
    made: dict[str, Chart] = {"before": Markup(draw(graph["before"], "the block before"))}
    if graph["after"] != graph["before"]:
        made["after"] = Markup(draw(graph["after"], "the block after"))
    return made


def _totals(report: RewriteReport) -> tuple[OpCount, OpCount]:
    before, after = OpCount(), OpCount()
    for row in report.sites:
        if row.ops_before is not None and row.ops_after is not None:
            before, after = before + row.ops_before, after + row.ops_after
    return before, after


def energy_chart(report: RewriteReport) -> str:
    """Estimated arithmetic energy of all sites, before and after; "" if nothing is priced."""
    old, new = (_nanojoules(total) for total in _totals(report))
    kinds = sorted({**old, **new})
    if not kinds:
        return ""
    kinds = ["all", *kinds]
    before = [sum(old.values()) if k == "all" else old.get(k, 0.0) for k in kinds]
    after = [sum(new.values()) if k == "all" else new.get(k, 0.0) for k in kinds]
    joules = [[n * 1e-6 for n in values] for values in (before, after)]
    return plots.paired("energy", kinds, joules[0], joules[1], "millijoules", "mJ")


def _unpriced(report: RewriteReport) -> int:
    return max(sum(energy(total).unpriced.values()) for total in _totals(report))


def _nanojoules(total: OpCount) -> dict[str, float]:
    """Arithmetic energy by "operation dtype"; moving data is left out."""
    priced = energy(total).arithmetic
    return {kind.replace(":", " "): picojoules / 1000 for kind, picojoules in priced.items()}


def _ops_ratio(row: Any) -> str:
    if row.ops_before is None or row.ops_after is None or not row.ops_after.total():
        return ""
    return f"{row.ops_before.total() / row.ops_after.total():.2f}×"
