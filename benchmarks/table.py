"""docs/performance.md from the stored results: limits, bars, one table for each workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.bars import Verdict, judge
from benchmarks.workloads import WORKLOADS

Results = Mapping[str, Mapping[str, Any]]
HEAD = """# Performance

Written by `python -m benchmarks` (`make bench`) from `benchmarks/results/`; do not edit by hand.
Every engine runs in its own process on the same inputs, in interleaved rounds of random order;
times are medians of single calls with the middle half beside them. Ratios are our median by the
peer's: below 1 ours is faster. "Error" is the largest difference of any output from eager
PyTorch; "against its model" that of the compiled code from the model it was compiled from, which
must be within tolerance, else the artifact counts as failed. Rewritten artifacts are not fitted
here: their error against eager is that of an approximation before any fit. "Share of peak" is the
floating operations the row's model needs, by time, by the machine's measured fused multiply-add
rate in float32 (a peer's work is counted as that of our exact artifact). "MB" is the growth of
the engine's process from before loading to after the first calls.
"""


def page(results: Results, images: Sequence[str] = ()) -> str:
    """The whole page; `results` by workload, `images` are paths relative to docs/."""
    parts = [HEAD]
    if not results:
        return HEAD + "\nNothing has been measured yet.\n"
    parts.append(_limits(results))
    parts.append(bars_table(judge(results)))
    parts += [f"![{_alt(image)}]({image})\n" for image in images]
    order = [w.name for w in WORKLOADS]
    known = sorted(results, key=lambda n: order.index(n) if n in order else len(order))
    parts += [_workload(name, results[name]) for name in known]
    return "\n".join(parts)


def _alt(image: str) -> str:
    return image.rsplit("/", 1)[-1].split(".")[0].replace("-", " ")


def _limits(results: Results) -> str:
    lines = ["## The machine\n", "| processor | threads | GFLOP/s (fma) | GB/s (stream) |"]
    lines.append("|---|---|---|---|")
    seen = []
    for result in results.values():
        peaks, cpu = result["peaks"], result.get("machine", {}).get("cpu", "?")
        row = f"| {cpu} | {peaks['threads']} | {peaks['gflops']:.0f} | {peaks['gbytes']:.1f} |"
        if row not in seen:
            seen.append(row)
    return "\n".join([*lines, *seen, ""])


def bars_table(verdicts: Sequence[Verdict]) -> str:
    """The bars, the ratio reached, and whether that is enough."""
    lines = ["## Bars\n", "| workload | row | bar | ratio | best peer | verdict |"]
    lines.append("|---|---|---|---|---|---|")
    for v in verdicts:
        ratio = "" if v.ratio is None else f"{v.ratio:.2f}"
        against = f"{v.peer} in {v.bar.against}" if v.bar.against else v.peer
        lines.append(
            f"| {v.bar.workload} | {v.bar.row} | {v.bar.most:.2f} | {ratio} | {against} "
            f"| {v.words()} |"
        )
    return "\n".join([*lines, ""])


def _workload(name: str, result: Mapping[str, Any]) -> str:
    lines = [f"## {name}\n"]
    lines.append(
        f"{result['model']}, {result.get('inputs') or result['options']}, "
        f"{result.get('threads', '?')} threads, {result.get('rounds', '?')} rounds, "
        f"{result['when']}\n"
    )
    lines.append(
        "| engine | median ms | middle half | ours / it | GFLOP/s | share of peak | error "
        "| against its model | MB | ready in s | remark |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    rows = sorted(result["engines"], key=lambda r: r.get("median_ms") or float("inf"))
    lines += [_line(row, result) for row in rows]
    lines += ["", *(f"- {note}" for note in result.get("notes", ()))]
    return "\n".join([*lines, ""])


def _line(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if row.get("median_ms") is None:
        why = str(row.get("why", "")).replace("|", "/")
        return f"| {row['label']} |" + " |" * 9 + f" {row['status']}: {why} |"
    ours = next((r["median_ms"] for r in result["engines"] if r["engine"] == "ours"), None)
    cells = [
        row["label"],
        f"{row['median_ms']:.2f}",
        f"{row['q1_ms']:.2f}-{row['q3_ms']:.2f}",
        "" if not ours else f"{ours / row['median_ms']:.2f}",
        _number(row.get("gflops"), ".0f"),
        _number(row.get("share_of_peak"), ".0%"),
        _number(row.get("max_abs_error"), ".1e"),
        _verified(row),
        _number(row.get("resident_mb"), ".0f"),
        _number(row.get("compile_s") or row.get("prepare_s"), ".1f"),
        str(row.get("why", "")).replace("|", "/"),
    ]
    return "| " + " | ".join(cells) + " |"


def _verified(row: Mapping[str, Any]) -> str:
    if "verified" not in row:
        return ""
    error = _number(row.get("compiled_max_abs"), ".1e")
    return error if row["verified"] else f"{error} NOT VERIFIED"


def _number(value: Any, how: str) -> str:
    return "" if value is None else format(value, how)
