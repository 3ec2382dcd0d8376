"""The benchmark harness on a tiny model: rows, verification, resuming, bars, page and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import peaks, run, store
from benchmarks.bars import BARS, Bar, judge
from benchmarks.plots import draw
from benchmarks.table import page
from benchmarks.workloads import EXACT, PEERS, WORKLOADS, Variant, Workload, workload_named

TINY = Workload(
    "tiny", "tests.bench_models:small", {}, 7,
    (EXACT, Variant("ours-wrong", {"form": "no_such_form"})),
)  # fmt: skip
LIMITS = {"gflops": 100.0, "gbytes": 10.0, "threads": 1}


def row(engine: str, ms: float | None, **more: Any) -> dict[str, Any]:
    timed = {"median_ms": ms, "q1_ms": ms, "q3_ms": ms} if ms else {"why": "not here"}
    return {"engine": engine, "label": engine, "status": "ok" if ms else "skipped"} | timed | more


def result(name: str, tokens: int, *rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "workload": name, "model": "m", "options": {}, "tokens": tokens, "peaks": LIMITS,
        "when": "now", "engines": list(rows),
    }  # fmt: skip


@pytest.mark.slow
def test_a_workload_gives_verified_rows_and_failures_with_reasons() -> None:
    settings = run.Settings(("eager",), seconds=0.05, rounds=1, threads=1)
    made = run.run_workload(TINY, settings, LIMITS, lambda _: None)
    rows = {r["engine"]: r for r in made["engines"]}
    assert set(rows) == {"ours", "eager", "ours-wrong"}
    ours = rows["ours"]
    assert ours["verified"] is True
    assert ours["max_abs_error"] < 1e-4
    assert ours["compiled_max_abs"] < 1e-4
    assert ours["flops"] > 0
    assert ours["share_of_peak"] == pytest.approx(ours["flops"] / ours["median_ms"] / 1e8)
    assert rows["eager"]["gflops"] == pytest.approx(
        ours["flops"] / rows["eager"]["median_ms"] / 1e6
    )
    assert rows["ours-wrong"]["status"] == "failed"
    assert "no_such_form" in rows["ours-wrong"]["why"]
    assert made["profile"]["kernels"]
    assert json.loads(json.dumps(made))["workload"] == "tiny"
    text = page({"tiny": made})
    assert "no_such_form" in text


def test_bars_are_met_missed_or_unknown() -> None:
    results = {
        "a": result("a", 1, row("ours", 6.0), row("eager", 20.0), row("onnxruntime", 10.0)),
        "b": result("b", 2, row("ours", 9.0, verified=False), row("eager", 10.0)),
        "c": result("c", 4, row("ours", 24.0)),
    }
    bars = [
        Bar("a", "ours", 0.6), Bar("a", "ours", 0.5), Bar("b", "ours", 0.9), Bar("x", "ours", 1),
        Bar("c", "ours", 4.6, ("ours",), "a"), Bar("c", "ours", 1.0),
    ]  # fmt: skip
    met, missed, wrong, gone, growth, alone = judge(results, bars)
    assert (met.met, met.ratio, met.peer) == (True, 0.6, "onnxruntime")
    assert missed.met is False
    assert "1.20 times" in missed.words()
    assert wrong.met is None  # an artifact that is not verified has no time
    assert gone.met is None
    assert (growth.met, growth.ratio) == (True, 4.0)
    assert "no time of eager" in alone.words()


def test_bars_name_workloads_that_exist() -> None:
    names = {w.name for w in WORKLOADS}
    assert {b.workload for b in BARS} <= names
    assert {b.against for b in BARS} - {""} <= names
    assert len(names) == len(WORKLOADS)
    with pytest.raises(KeyError, match="minilm-512"):
        workload_named("minilm")


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = (Workload("one", "m", {}, 1, (EXACT,)), Workload("two", "m", {}, 4, (EXACT,)))
    ran: list[str] = []

    def fake(workload: Workload, *_: Any) -> dict[str, Any]:
        ran.append(workload.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        rows = [row("ours", 1.0 * len(ran)), *(row(n, None) for n in PEERS)]
        return result(workload.name, workload.tokens, *rows)

    monkeypatch.setattr(command, "WORKLOADS", two)
    monkeypatch.setattr(command, "run_workload", fake)
    monkeypatch.setattr(command, "measure_peaks", lambda _: LIMITS)
    (tmp_path / "docs").mkdir()
    arguments = ["--results", str(tmp_path / "r"), "--docs", str(tmp_path / "docs")]
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    assert command.main(arguments) == 0
    assert ran == ["one", "two", "two"]
    assert command.main(arguments) == 0
    assert len(ran) == 3
    assert command.main([*arguments, "--again"]) == 0
    assert ran[3:] == ["one", "two"]
    text = (tmp_path / "docs" / "performance.md").read_text()
    assert "## one" in text
    assert "images/time-m.svg" in text
    assert (tmp_path / "docs" / "images" / "time-m.svg").read_text().count("<svg") == 1


def test_list_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_workload", lambda *_: pytest.fail("ran"))
    assert command.main(["--list", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "minilm-128-batch8" in said
    assert f"{len(WORKLOADS)} of {len(WORKLOADS)} workloads to run, about" in said


def test_damaged_results_are_left_out(tmp_path: Path) -> None:
    store.save(tmp_path, result("good", 1, row("ours", 1.0)))
    (tmp_path / "bad.json").write_text('{"workload": "bad", ')
    (tmp_path / "other.json").write_text("[]")
    found = store.load_all(tmp_path)
    assert list(found) == ["good"]
    assert store.complete(found["good"], ("ours",))
    assert not store.complete(found["good"], ("ours", "eager"))
    assert not store.complete(None, ())


def test_plots_need_two_lengths_or_a_profile(tmp_path: Path) -> None:
    alone = result("a", 16, row("ours", 1.0))
    assert draw({"a": alone}, tmp_path) == []
    kernel = {"name": "k", "rule": "dense", "share": 1.0, "gflops": 50.0}
    alone["profile"] = {"kernels": [kernel, {**kernel, "gflops": None}]}
    more = result("b", 64, row("ours", 3.0), row("eager", 9.0))
    names = [p.name for p in draw({"a": alone, "b": more}, tmp_path)]
    assert names == ["time-m.svg", "kernels-a.svg"]


def test_peaks_are_checked_and_positive() -> None:
    made = peaks.measure(1, seconds=0.01, floats=100_000)
    assert made.gflops > 0.5
    assert made.gbytes > 0.05
