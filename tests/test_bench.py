"""bench: rows for every engine, true statistics, workers that fail or hang are survived.

Nothing here asserts how fast anything is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codegen.specs import TensorSpec
from passes.errors import UnknownName, UsageError
from rewriter import bench as bench_module
from rewriter import engines as engines_module
from rewriter.bench import Subject, _Entry, bench
from rewriter.engines import Engine, Job, engines, load_module, select
from rewriter.engines.process import WorkerError, WorkerProcess
from rewriter.engines.worker import _timed
from rewriter.timings import BenchResult, EngineTiming, max_abs_error, statistics
from tests.bench_models import small

MODEL = "tests.bench_models:small"


def inputs() -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in small()[1].items()}


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Any]:
    started: list[WorkerProcess] = []

    def start(engine: str, model: str = MODEL) -> WorkerProcess:
        np.savez(tmp_path / "in.npz", **inputs())
        arguments = [engine, model, "--inputs", str(tmp_path / "in.npz")]
        arguments += ["--outputs", str(tmp_path / "out.npz"), "--folder", str(tmp_path)]
        started.append(WorkerProcess(arguments, 1, tmp_path / "log"))
        return started[-1]

    yield start
    for process in started:
        process.stop()
        assert process.process.poll() is not None


# --- engines ------------------------------------------------------------------------------------


def test_one_file_per_engine_and_ours_first() -> None:
    found = engines()
    assert next(iter(found)) == "ours"
    assert {"eager", "inductor", "onnxruntime", "openvino-f32", "openvino-default"} <= set(found)
    assert all(e.label and callable(e.prepare) for e in found.values())


def test_groups_and_names_select_each_engine_once() -> None:
    assert [e.name for e in select(["openvino"])] == ["openvino-default", "openvino-f32"]
    assert [e.name for e in select(["eager", "ours", "eager"])] == ["eager", "ours"]
    with pytest.raises(UnknownName, match="did you mean onnxruntime"):
        select(["onnxruntim"])


def test_an_engine_that_is_not_installed_says_how_to_get_it() -> None:
    engine = Engine("x", "X", lambda _: list, needs=("no_such_module_x",), extra="bench")
    assert "no_such_module_x not installed" in engine.missing()
    assert "attention-rewriter[bench]" in engine.missing()
    assert replace(engine, needs=("json",)).missing() == ""


def test_load_module_keeps_dtypes_and_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        model, tensors = load_module(Job(MODEL, inputs(), 1, tmp_path))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert tensors["ids"].dtype == torch.int64
    assert not model.training


# --- the worker's protocol ----------------------------------------------------------------------


def test_a_worker_answers_and_leaves_the_right_outputs(worker: Any, tmp_path: Path) -> None:
    process = worker("eager")
    said = process.ask(None, 120)
    assert said["state"] == "ready"
    assert said["outputs"] == 2
    times = process.ask({"seconds": 0.01, "least": 3, "most": 5}, 60)["ms"]
    assert 3 <= len(times) <= 5
    assert all(ms > 0 for ms in times)
    model, tensors = small()
    with torch.no_grad():
        want = model(**tensors)
    with np.load(tmp_path / "out.npz") as got:
        np.testing.assert_allclose(got["output_0000"], want["tokens"].numpy(), atol=1e-6)
        np.testing.assert_allclose(got["output_0001"], want["mean"].numpy(), atol=1e-6)


def test_a_worker_that_can_not_prepare_says_why_in_one_line(worker: Any) -> None:
    said = worker("eager", "tests.bench_models:broken").ask(None, 120)
    assert said["state"] == "failed"
    assert "broken" in said["why"]
    assert "\n" not in said["why"]


def test_a_worker_that_dies_or_is_silent_raises(worker: Any) -> None:
    process = worker("eager")
    with pytest.raises(WorkerError, match="no answer"):
        process.ask(None, 0.01)
    process.process.kill()
    with pytest.raises(WorkerError, match="ended"):
        process.ask({"seconds": 1, "least": 1, "most": 1}, 30)


def test_a_worker_ends_with_its_parent_s_pipe(worker: Any) -> None:
    process = worker("eager")
    process.ask(None, 120)
    process.process.stdin.close()
    assert process.process.wait(30) == 0


def test_times_are_bounded_in_number_and_time() -> None:
    calls: list[float] = []
    assert len(_timed(lambda: calls.append(0) or [], 0.0, 3, 9)) == 3
    assert len(_timed(lambda: calls.append(0) or [], 60.0, 3, 9)) == 9
    assert len(calls) == 3 + 9 + 2  # one call before each timing is not counted
    assert all(ms >= 5 for ms in _timed(lambda: time.sleep(0.005) or [], 0.0, 2, 2))


# --- numbers ------------------------------------------------------------------------------------


def test_statistics_are_quartiles() -> None:
    made = statistics([4.0, 1.0, 3.0, 2.0, 100.0])
    assert made == {"median_ms": 3.0, "q1_ms": 2.0, "q3_ms": 4.0, "min_ms": 1.0, "runs": 5}
    assert statistics([]) == {}


def test_max_abs_error_takes_outputs_in_order() -> None:
    a, b = np.random.default_rng().standard_normal((2, 3, 4))
    assert max_abs_error([a, b], [a, b]) == 0
    assert max_abs_error([a, b], [a, a]) == pytest.approx(np.abs(b - a).max())
    assert max_abs_error([a], [a, b]) is None
    assert max_abs_error([a[:1]], [a]) is None
    broken = a.copy()
    broken[0, 0] = np.nan
    assert np.isnan(max_abs_error([broken], [a]) or 0.0)


def test_result_round_trip_and_faster() -> None:
    rows = (
        EngineTiming("ours", "o", "ok", "", 2.0, 1.9, 2.2, 1.8, 1.0, 1e-6, 30, 0.5),
        EngineTiming("eager", "e", "ok", "", 3.0, 2.9, 3.3, 2.8, 1.5, 0.0, 30, 0.5),
        EngineTiming("x", "X", "skipped", "not installed"),
    )
    made = BenchResult("m", 2, rows, 3, 3, 0.1, {"cpu": "c"}, {"x": "f"}, {}, ("n",))
    assert BenchResult.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert made.faster is True
    assert made.to_json()["engines"][0]["iqr_ms"] == pytest.approx(0.3)
    assert replace(made, engines=rows[1:]).faster is None


# --- the whole ----------------------------------------------------------------------------------


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> Subject:
    """A subject without an artifact: ours fails, the others run."""
    thing = Subject("small", inputs(), Path("/nonexistent.rwa"), MODEL)
    monkeypatch.setattr(bench_module, "_subject", lambda *_: thing)
    return thing


def test_bench_gives_a_row_for_every_engine(subject: Subject) -> None:
    seen: list[str] = []
    made = bench(
        "x", engines=["eager"], repeats=2, seconds=0.05, threads=1,
        progress=lambda stage, *_: seen.append(stage),
    )  # fmt: skip
    ours, eager = made.engine("ours"), made.engine("eager")
    assert ours is not None
    assert eager is not None
    assert ours.status == "failed"
    assert "nonexistent.rwa" in ours.why
    assert (eager.status, eager.max_abs_error) == ("ok", 0.0)
    assert eager.runs >= 4
    assert eager.median_ms is not None
    assert eager.q1_ms is not None
    assert eager.q3_ms is not None
    assert eager.q1_ms <= eager.median_ms <= eager.q3_ms
    assert eager.ratio is None
    assert made.threads == 1
    assert made.inputs["ids"] == "int64 [2, 7]"
    assert {"time", "done"} <= set(seen)
    assert BenchResult.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "inductor"])
def test_every_peer_computes_the_model(subject: Subject, name: str) -> None:
    for engine in select([name]):
        if engine.missing():
            pytest.skip(engine.missing())
    made = bench("x", engines=[name], repeats=1, seconds=0.02)
    for engine in select([name]):
        row = made.engine(engine.name)
        assert row is not None
        assert row.status == "ok", row.why
        assert row.max_abs_error is not None
        assert row.max_abs_error < (0.05 if engine.name == "openvino-default" else 1e-5)


def test_missing_engines_are_skipped_with_the_reason(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = engines()
    gone = replace(known["eager"], needs=("no_such_module_y",))
    monkeypatch.setattr(engines_module, "engines", lambda: {**known, "eager": gone})
    made = bench("x", engines=["eager"], repeats=1, seconds=0.01)
    row = made.engine("eager")
    assert row is not None
    assert row.status == "skipped"
    assert "no_such_module_y" in row.why


def test_an_engine_that_breaks_while_timed_keeps_the_others(subject: Subject) -> None:
    class Silent:
        def ask(self, *_: Any) -> dict[str, Any]:
            raise WorkerError("its process ended (exit status -9)")

        def stop(self) -> None:
            pass

    class Good(Silent):
        def ask(self, *_: Any) -> dict[str, Any]:
            return {"ms": [1.0, 2.0]}

    found = engines()
    entries = [
        _Entry(found["eager"], EngineTiming("eager", "e", "ok"), Good()),  # type: ignore[arg-type]
        _Entry(found["inductor"], EngineTiming("inductor", "i", "ok"), Silent()),  # type: ignore[arg-type]
    ]
    bench_module._rounds(entries, 2, 0.01, lambda *_: None)
    assert entries[0].ms == [1.0, 2.0, 1.0, 2.0]
    assert entries[1].row.status == "failed"
    assert "-9" in entries[1].row.why


def test_notes_say_what_makes_the_numbers_doubtful() -> None:
    rows = [EngineTiming("ours", "o", "ok", median_ms=2.0, ratio=1.0),
            EngineTiming("eager", "PyTorch eager", "ok", median_ms=1.0, ratio=0.5)]  # fmt: skip
    thing = Subject("m", {}, None, None, approximate=("elu",))
    notes = " ".join(bench_module._doubts(rows, thing, 1.5))
    assert "1.5 cores" in notes
    assert "approximates attention (elu)" in notes
    assert "NOT faster than PyTorch eager" in notes
    assert bench_module._doubts(rows[:1], replace(thing, approximate=()), 0.0) == []


@pytest.mark.parametrize(
    "wrong", [{"threads": 0}, {"repeats": 0}, {"seconds": 0.0}, {"seconds": float("nan")}]
)
def test_wrong_numbers_are_usage_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        bench("x", **wrong)
    with pytest.raises(UnknownName):
        bench("x", engines=["nothing"])


def test_sizes_of_the_model_s_inputs_come_from_the_artifact() -> None:
    text = [TensorSpec("input_ids", (2, 64), "int64", 0, 99), TensorSpec("m", (2, 64), "int64")]
    image = [TensorSpec("pixel_values", (3, 3, 224, 224), "float32")]
    assert bench_module._sizes(text) == {"batch": 2, "tokens": 64}
    assert bench_module._sizes(image) == {"batch": 3, "image": 224}
    assert bench_module._sizes([TensorSpec("x", (2, 3, 4), "float32")]) == {}
    made = bench_module.random_inputs([*text, *image])
    assert made["input_ids"].shape == (2, 64)
    assert made["input_ids"].min() >= 0
    assert made["input_ids"].max() <= 99
    assert made["pixel_values"].dtype == np.float32
    specs = [TensorSpec("ids", (2, 9), "int64"), TensorSpec("scale", (16,), "float32")]
    with pytest.raises(UsageError, match="'ids' has shape"):
        bench_module.model_inputs(MODEL, {}, specs)


def test_library_chatter_does_not_reach_the_protocol() -> None:
    """What an engine prints to stdout, from Python or C, must not mix with the replies."""
    code = (
        "import os, sys\n"
        "from rewriter.engines.worker import _own_stdout, _say\n"
        "reply = _own_stdout()\n"
        "print('from python'); os.write(1, b'from c\\n')\n"
        "_say(reply, {'ms': [1]})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(done.stdout) == {"ms": [1]}
    assert b"from python" in done.stderr
    assert b"from c" in done.stderr
