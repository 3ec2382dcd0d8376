"""The sentences of a report: summary and explanation, the same in terminal, JSON and page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from passes.site import SiteStatus

if TYPE_CHECKING:
    from rewriter.report import RewriteReport
    from rewriter.report_rows import SiteRow


BUSY = 0.2  # cores other processes may use before times are called doubtful


def number(value: Any, digits: int = 3) -> str:
    """A measured value in words: "not measured" for None, "not finite" for NaN and infinity."""
    if value is None:
        return "not measured"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.{digits}g}"


def milliseconds(value: float | None) -> str:
    """A time with a unit that suits it."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value < 1:
        return f"{value * 1000:.3g} µs"
    return f"{value:.0f} ms" if value >= 1000 else f"{value:.3g} ms"


def count(value: float) -> str:
    """A large count with an SI prefix."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "


def summary(report: RewriteReport) -> str:
    """A few sentences: what was done, how exact, how alike, how fast."""
    parts = [_done(report), _compiled(report), _alike(report), _speed(report)]
    return " ".join(p for p in parts if p)


def _done(report: RewriteReport) -> str:
    if not report.sites:
        misses = len(report.near_misses)
        near = f" ({misses} near miss{'es' if misses != 1 else ''})" if misses else ""
        return f"{report.model}: no attention was found{near}."
    forms = sorted({r.form for r in report.sites if r.status is SiteStatus.REWRITTEN})
    to = f" to {', '.join(forms)}" if forms else ""
    done = (
        f"{report.model}: rewrote {report.sites_rewritten} of {report.sites_found} attention sites"
    )
    return f"{done}{to}{_others(report)}."


def _others(report: RewriteReport) -> str:
    counts: dict[str, int] = {}
    for row in report.sites:
        if row.status is not SiteStatus.REWRITTEN:
            word = str(row.status).lower()
            counts[word] = counts.get(word, 0) + 1
    return "".join(f", {n} {word}" for word, n in counts.items())


def _compiled(report: RewriteReport) -> str:
    stats = report.compiled
    if stats is None:
        return ""
    verdict = "within" if stats.get("ok") else "NOT within"
    return (
        f"Compiled code differs from the rewritten model by at most {number(stats.get('max_abs'))} "
        f"({verdict} its tolerance)."
    )


def _alike(report: RewriteReport) -> str:
    if not report.approximate:
        # Linear layers may be: their note says so, and the fidelity what it did.
        known = f"; {fidelity_text(report.fidelity)}" if report.fidelity else ""
        return f"No attention site is approximated{known}." if report.sites else ""
    return f"{len(report.approximate)} site(s) are approximate: {fidelity_text(report.fidelity)}."


def fidelity_text(fidelity: Mapping[str, Any] | None) -> str:
    """Rewritten against original in words."""
    if not fidelity or fidelity.get("cosine_mean") is None:
        return "fidelity to the original was not measured"
    text = f"mean cosine to the original model {number(fidelity['cosine_mean'], 4)}"
    if fidelity.get("relative_error") is not None:
        text += f", relative error {number(fidelity['relative_error'])}"
    return text


def _speed(report: RewriteReport) -> str:
    times = report.times()
    if "ours" not in times:
        return ""
    threads = (report.timings or {}).get("threads")
    text = f"Median {milliseconds(times['ours'])} on {threads} thread(s)"
    if "eager" in times and times["ours"] > 0:
        text += f", {speed_words(times['eager'] / times['ours'])} eager PyTorch in the same run"
    beaten = [engine_name(report, e) for e in report.beaten_by if e != "eager"]
    if beaten:
        text += f"; NOT faster than {', '.join(beaten)}"
    if busy(report):
        text += " (the machine was busy: measure again when it is idle)"
    return text + "."


def busy(report: RewriteReport) -> bool:
    """Whether other processes used a core while the engines were timed."""
    return float((report.timings or {}).get("load") or 0.0) > BUSY


def engine_name(report: RewriteReport, engine: str) -> str:
    """An engine's name for readers."""
    for row in (report.timings or {}).get("engines", ()):
        if row["engine"] == engine:
            return str(row.get("label") or engine)
    return engine


def speed_words(ratio: float) -> str:
    """`ratio` is their time over ours: "2.1x faster than" or "1.3x SLOWER than"."""
    if not math.isfinite(ratio) or ratio <= 0:
        return "not comparable with"
    if ratio >= 1.005:
        return f"{ratio:.2f}x faster than"
    return "as fast as" if ratio > 0.995 else f"{1 / ratio:.2f}x SLOWER than"


def explain(row: SiteRow) -> str:
    """Some lines: what happened to one site, why, and every form's verdict."""
    site, d = row.site, row.site.dims
    shape = f"batch {d.B}, heads {d.H}/{d.G}, queries {d.T}, keys {d.S}, width {d.D}/{d.E}"
    lines = [
        f"{site.id}: {row.status}, form {row.form} ({'exact' if row.exact else 'approximate'})",
        f"  {shape}; mask {site.mask.kind}; {site.dtype}; scale {site.scale:.6g}",
        f"  from {site.source or 'unknown source'}, found by {site.found_by}",
    ]
    if row.why:
        lines.append(f"  why: {row.why}")
    if row.error_before_fit is not None or row.error_after_fit is not None:
        before, after = number(row.error_before_fit), number(row.error_after_fit)
        lines.append(f"  relative error before fit: {before}; after fit: {after}")
    if row.ops_before and row.ops_after:
        before, after = count(row.ops_before.total()), count(row.ops_after.total())
        lines.append(f"  operations: {before.strip()} exact, {after.strip()} as it stands")
    lines += [f"  {name}: {verdict_text(v)}" for name, v in row.verdicts.items()]
    return "\n".join(lines)


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """A form's verdict in words."""
    if verdict.get("ok"):
        return "yes"
    return f"no ({verdict.get('code')}: {verdict.get('detail')})"
