"""What the command line shows: reports and timings as rich tables. No markup is ever parsed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from passes.site import SiteStatus
from rewriter.wording import count, fidelity_text, milliseconds, number

if TYPE_CHECKING:
    from rewriter.report import RewriteReport

STYLES: Mapping[SiteStatus, str] = {
    SiteStatus.REWRITTEN: "blue",
    SiteStatus.REFUSED: "yellow",
    SiteStatus.REVERTED: "yellow",
    SiteStatus.FAILED: "bold red",
}


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(title=Text(title), title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in right else "left")
    return table


def _cell(value: Any) -> str:
    return "" if value is None else number(value)


def report_view(report: RewriteReport) -> RenderableType:
    """Sites, exactness and likeness, kernels by rule, timings, near misses and notes."""
    parts: list[RenderableType] = [_sites(report)]
    parts += [_line("exact", _exact_line(report)), _line("approximate", _likeness_line(report))]
    if report.kernels:
        parts.append(_kernels(report))
    if report.timings:
        parts.append(bench_view(report.timings))
    parts += [
        _line("near miss", f"{m.module_path or m.node} {m.source}: {m.reason}")
        for m in report.near_misses
    ]
    parts += [_line("note", note) for note in report.notes]
    return Group(*parts)


def _line(word: str, text: str) -> Text:
    return Text.assemble((f"{word}: ", "bold"), text)


def _sites(report: RewriteReport) -> Table:
    table = _table(
        f"{report.model}: {report.sites_rewritten} of {report.sites_found} sites rewritten",
        "site", "status", "form", "error before fit", "error now", "operations", "why",
        right=("error before fit", "error now", "operations"),
    )  # fmt: skip
    for row in report.sites:
        kind = "" if row.exact else " (approximate)"
        table.add_row(
            Text(row.site.id),
            Text(str(row.status), style=STYLES.get(row.status, "")),
            Text(row.form + kind),
            _cell(row.error_before_fit),
            _cell(row.error),
            _operations(row),
            Text(row.why),
        )
    return table


def _operations(row: Any) -> str:
    if row.ops_before is None or row.ops_after is None:
        return ""
    before, after = row.ops_before.total(), row.ops_after.total()
    if before == after:
        return count(after).strip()
    return f"{count(before).strip()} → {count(after).strip()}"


def _exact_line(report: RewriteReport) -> str:
    stats = report.compiled
    if stats is None:
        return "not compiled (or its code can not run here)"
    verdict = "within tolerance" if stats.get("ok") else f"OUT OF TOLERANCE, {stats.get('why')}"
    return (
        f"compiled code differs from the rewritten model by at most "
        f"{number(stats.get('max_abs'))} (allowed {number(stats.get('tolerance'))}; {verdict})"
    )


def _likeness_line(report: RewriteReport) -> str:
    if not report.approximate:
        return "no site; every attention computes what it did"
    return f"{len(report.approximate)} site(s); {fidelity_text(report.fidelity)}"


def _kernels(report: RewriteReport) -> Table:
    by_rule: dict[str, list[str]] = {}
    for kernel in report.kernels:
        by_rule.setdefault(kernel.scheduled_by or "nothing", []).append(kernel.name)
    table = _table(f"{len(report.kernels)} kernels", "scheduled by", "number", "kernels")
    for rule, names in sorted(by_rule.items()):
        table.add_row(Text(rule), str(len(names)), Text(", ".join(names)))
    return table


def bench_view(timings: Any) -> RenderableType:
    """A BenchResult (or its plain data) as a table with its notes."""
    data = timings.to_json() if hasattr(timings, "to_json") else timings
    right = ("median", "middle half", "ratio", "error against eager", "runs")
    table = _table(
        f"{data.get('subject', '')} on {data['threads']} thread(s)".strip(),
        "engine", *right[:4], "runs", "remark", right=right,
    )  # fmt: skip
    for row in data["engines"]:
        table.add_row(*_engine_cells(row))
    notes = [_line("note", note) for note in data.get("notes", ())]
    return Group(table, *notes)


def _engine_cells(row: Mapping[str, Any]) -> list[RenderableType]:
    name = Text(
        str(row.get("label") or row["engine"]), style="bold" if row["engine"] == "ours" else ""
    )
    if row.get("median_ms") is None:
        return [name, "", "", "", "", "", Text(f"{row['status']}: {row['why']}")]
    ratio = row.get("ratio")
    slower = ratio is not None and ratio < 1
    return [
        name,
        milliseconds(row["median_ms"]),
        f"{milliseconds(row['q1_ms'])} - {milliseconds(row['q3_ms'])}",
        Text("" if ratio is None else f"{ratio:.2f}x", style="red" if slower else ""),
        _cell(row.get("max_abs_error")),
        str(row["runs"]),
        Text(str(row.get("why", ""))),
    ]


def profile_view(profile: Any) -> RenderableType:
    """A codegen Profile as a table: kernels by time, with what they reach and their rule."""
    right = ("ms a run", "share", "calls", "GFLOP/s", "GB/s")
    table = _table(
        f"kernels on {profile.threads} thread(s), {milliseconds(profile.plain_ms)} a run",
        "kernel", *right, "scheduled by", right=right,
    )  # fmt: skip
    for row in profile.kernels:
        table.add_row(
            Text(row.name),
            f"{row.ms:.3f}",
            f"{row.share:.1%}",
            str(row.calls),
            "" if row.gflops is None else f"{row.gflops:.1f}",
            "" if row.gbytes is None else f"{row.gbytes:.1f}",
            Text(row.rule),
        )
    note = (
        f"a run took {milliseconds(profile.instrumented_ms)} with the instrument and "
        f"{milliseconds(profile.plain_ms)} without; medians of {profile.runs} runs"
    )
    return Group(table, _line("note", note))
