"""Tuning a small model, applying its records in compile, and records that must not be applied."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from rich.console import Console

import codegen.tune
from codegen.target import target_named
from codegen.trace_store import Best, KernelStore, Lock
from codegen.tune_space import Search, replay, trace_json
from codegen.tuned import HIT, KEPT, MISS, Tuned
from passes.errors import TuningError, UsageError
from rewriter.api import Result, compile, rewrite, tune
from rewriter.session import TuningSession, records_for
from tests.tune.models import two

TARGET = target_named("cpu")


def result(wide: int = 96, out: int = 48) -> Result:
    model, inputs = two(wide, out)
    return rewrite(model, inputs, form="exact", on_noop="ok")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> TuningSession:
    """The small model after a few seconds of tuning; tests copy the folder before changing it."""
    told: list[tuple[Any, ...]] = []
    folder = tmp_path_factory.mktemp("tuned") / "session"
    session = tune(result(), session=folder, minutes=0.1, progress=lambda *a: told.append(a))
    while not all(k.trials for k in session.kernels):  # a busy machine starts workers slowly
        session.run(minutes=0.1)
    assert told
    assert all(len(a) == 3 and 0 <= a[1] <= a[2] for a in told)
    assert [a[1] for a in told] == sorted(a[1] for a in told)
    return session


@pytest.fixture
def copy(tuned: TuningSession, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tuned.folder, tmp_path / "copy"))


def winner(files: KernelStore, trace: Any, ratio: float = 0.5) -> Best:
    """A record that says `trace` won, however it came about."""
    best = Best(len(files.trials()), trace, 1e-6, 2e-6, ratio, 0.0, 4)
    files.put_best(best)
    return best


def apply(folder: Path) -> dict[str, Any]:
    """The outcome of every kernel of the small model under the records of `folder`."""
    records = records_for(folder, TARGET)
    store = records.store
    try:
        for key in store.kernels:
            records(tvm.ir.load_json(store.kernel(key).func_json()), TARGET)
        return {r["key"]: r for r in records.to_json()["kernels"]}
    finally:
        records.close()


def test_session_knows_its_key_kernels_and_trials(tuned: TuningSession) -> None:
    assert tuned.state == "finished"
    assert tuned.budget == pytest.approx(6.0)
    assert tuned.key["workloads"] == sorted(k.key for k in tuned.kernels)
    assert set(tuned.key) == {"target", "versions", "forms", "workloads"}
    assert len(tuned.kernels) == 2
    assert all(k.calls == 1 and k.default_seconds for k in tuned.kernels)
    assert tuned.trials > 0
    for kernel in tuned.kernels:
        trials = tuned.store.kernel(kernel.key).trials()
        assert trials[0].trace is None  # the default, before anything else
        seen = [json.dumps(t.trace) for t in trials]
        assert len(seen) == len(set(seen)), "a candidate was tried twice"
        if kernel.best is not None:
            assert kernel.best.ratio < 0.97
            assert kernel.best.seeds >= 4
    assert tuned.speedup >= 1.0


def test_session_as_plain_data_and_as_a_table(tuned: TuningSession) -> None:
    data = json.loads(json.dumps(tuned.to_json()))
    assert data["trials"] == tuned.trials == sum(k["trials"] for k in data["kernels"])
    console = Console(width=200, record=True)
    console.print(tuned.table())
    text = console.export_text()
    assert all(k.name in text for k in tuned.kernels)
    assert set(tuned.best) == {k.name for k in tuned.kernels}


def test_compile_lists_hits_and_misses_and_stays_right(copy: Path, tmp_path: Path) -> None:
    made = result()
    with compile(made, path=tmp_path / "m.rwa", session=copy) as artifact:
        x = torch.randn(64, 64)
        (out,) = artifact.run({artifact.inputs[0].name: x.numpy()}).values()
        np.testing.assert_allclose(out, made.model(x).detach().numpy(), atol=1e-4)
    listed = made.report.artifact["tuning"]
    assert listed["hits"] + listed["kept"] + listed["misses"] == len(listed["kernels"]) == 2
    assert listed["misses"] == 0, listed
    by_name = {k.name: k.scheduled_by for k in made.report.kernels}
    for row in listed["kernels"]:
        assert (by_name[row["name"]] == "tuned") == (row["outcome"] == HIT)
        assert row["outcome"] != HIT or row["ratio"] < 1.0
    assert any("tuning session" in note for note in made.report.notes)


def test_other_target_and_other_model_are_refused(copy: Path) -> None:
    other = replace(TARGET, tvm={**TARGET.tvm, "num-cores": 64})
    with pytest.raises(TuningError, match="with other properties"):
        records_for(copy, other)
    with pytest.raises(TuningError, match="with other properties"):
        TuningSession.open(copy, result(), target=other)
    for name in ("edge:cortex-a72", "cuda:sm_90"):
        with pytest.raises(TuningError, match="can not be tuned here"):
            TuningSession.open(copy, result(), target=name)
    with pytest.raises(TuningError, match="kernels of another model"):
        TuningSession.open(copy, result(wide=32, out=32))
    with pytest.raises(TuningError, match=r"holds no session.json"):
        records_for(copy / "nowhere", TARGET)


def test_new_kernels_are_added_and_old_ones_keep_their_trials(copy: Path) -> None:
    before = TuningSession.open(copy, result())
    assert before.trials > 0
    grown = TuningSession.open(copy, result(out=80))
    assert len(grown.kernels) == 3
    assert grown.trials == before.trials
    assert [k.trials for k in grown.kernels if k.default_seconds is None] == [0]


def test_kernels_the_session_lacks_are_misses(copy: Path, tmp_path: Path) -> None:
    made = result(wide=32, out=32)
    with compile(made, path=tmp_path / "m.rwa", session=copy):
        pass
    rows = made.report.artifact["tuning"]["kernels"]
    assert {r["outcome"] for r in rows} == {MISS}
    assert all("does not have this kernel" in r["why"] for r in rows)
    assert {r["name"] for r in rows} == {k.name for k in made.report.kernels}
    assert all(k.scheduled_by != "tuned" for k in made.report.kernels)


@pytest.mark.slow
def test_records_that_lie_are_not_applied(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel's record belongs to another computation, the other's claims a speed it lacks."""
    measure = Tuned._measure

    def never_faster(*args: Any) -> Any:
        """As measured, but the noise of a busy machine makes nothing faster."""
        found = measure(*args)
        return {**found, "ratio": max(found["ratio"], 1.0)}

    monkeypatch.setattr(Tuned, "_measure", never_faster)
    store = TuningSession.open(copy, result()).store
    one, other = (store.kernel(key) for key in store.kernels)
    winner(one, [[["GetSBlock", [], ["attention", "main"], ["b0"]]], []])
    winner(other, trace_json(replay(tvm.ir.load_json(other.func_json()), [[], []])), ratio=0.01)
    rows = apply(copy)
    assert rows[one.key]["outcome"] == MISS
    assert "does not fit" in rows[one.key]["why"]
    assert rows[other.key]["outcome"] == KEPT
    assert "the default is faster" in rows[other.key]["why"]


def wrong_trace(files: KernelStore) -> Any:
    """Legal for TVM, wrong in float32: the product is summed in float16."""
    sch = replay(tvm.ir.load_json(files.func_json()), [[], []])
    sch.unsafe_set_dtype(sch.get_sblock("dense"), 0, "float16")
    return trace_json(sch)


def test_wrong_and_altered_records_are_not_applied(copy: Path) -> None:
    store = TuningSession.open(copy, result()).store
    wrong, altered = (store.kernel(key) for key in store.kernels)
    winner(wrong, wrong_trace(wrong))
    winner(altered, [[], []])
    path = altered.folder / "best.json"
    path.write_text(path.read_text().replace('"ratio": 0.5', '"ratio": 0.1'))
    rows = apply(copy)
    assert rows[wrong.key]["outcome"] == MISS
    assert "Mismatch" in rows[wrong.key]["why"]
    assert rows[altered.key]["outcome"] == MISS
    assert "altered" in rows[altered.key]["why"]


class WrongSearch(Search):
    """Proposes one candidate: the wrong one."""

    def next(self) -> Any | None:
        proposed, self._proposed = getattr(self, "_proposed", False), True
        store = KernelStore(WrongSearch.folder / codegen.tune.workload_key(self.own._func))
        return None if proposed else wrong_trace(store)

    folder: Path


@pytest.mark.slow
def test_wrong_candidate_is_recorded_and_never_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WrongSearch.folder = tmp_path / "s"
    monkeypatch.setattr(codegen.tune, "Search", WrongSearch)
    session = tune(result(), session=tmp_path / "s", minutes=1)
    assert [k.trials for k in session.kernels] == [k.failed for k in session.kernels] == [1, 1]
    assert list(session.best.values()) == [None, None]
    for kernel in session.kernels:
        assert "Mismatch" in session.store.kernel(kernel.key).trials()[1].error
    assert {r["outcome"] for r in apply(tmp_path / "s").values()} == {KEPT}


def test_second_process_on_one_session_is_refused(copy: Path) -> None:
    session = TuningSession.open(copy, result())
    with Lock(copy):
        with pytest.raises(TuningError, match="another process is tuning here"):
            TuningSession.open(copy, result())
        with pytest.raises(TuningError, match="another process is tuning here"):
            session.run(minutes=1)


def test_minutes_must_be_a_positive_number(tuned: TuningSession) -> None:
    for minutes in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="minutes"):
            tuned.run(minutes=minutes)
