"""A fit that is killed goes on from its folder; a foreign or damaged folder is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.errors import FitError
from rewriter.fit import Recipe, fit
from rewriter.fit_state import FitState, StateFolder
from tests.fit.models import batches, rewritten

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(sequential_share=0.03, site_steps=3, block_steps=3, end_steps=4000, save_every=0.3)
CHILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.fit.models import batches, rewritten
from tests.fit.test_resume import RECIPE
from rewriter.fit import fit
fit(rewritten(), batches(5, 1), seconds=600, state_dir=Path(sys.argv[1]), recipe=RECIPE)
"""


def record(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    return json.loads(path.read_text())["state"] if path.exists() else {}


def test_a_fit_killed_with_9_resumes_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], cwd=ROOT)
    try:
        limit = time.monotonic() + 240
        while not (record(folder).get("task") == "end" and record(folder)["step"] > 5):
            assert child.poll() is None, "the fit ended before it could be killed"
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    left = record(folder)
    seconds = left["used"] + 4.0  # enough for some more steps, then time ends it
    report = fit(rewritten(), batches(5, 1), seconds=seconds, state_dir=folder, recipe=RECIPE)
    assert report.resumed == 1
    assert [s.name for s in report.stages] == ["sites"] * 2 + ["sequential"] * 2 + [
        "blocks",
        "end to end",
    ]
    assert report.stages[-1].steps > left["step"]
    assert report.stages[-1].loss_before == left["loss_before"]
    assert report.stages[0].seconds == left["records"]["stages"][0]["seconds"]
    assert report.seconds > left["used"]
    assert report.fidelity.cosine_mean > report.fidelity_before.cosine_mean
    again = fit(rewritten(), batches(5, 1), seconds=seconds, state_dir=folder, recipe=RECIPE)
    assert again.resumed == 2
    assert again.stages == report.stages
    assert again.fidelity == report.fidelity


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit") / "state"
    quick = Recipe(site_steps=2, block_steps=2, end_steps=2)
    fit(rewritten(), batches(4, 1), seconds=600, state_dir=folder, recipe=quick)
    return folder


def resume(folder: Path, **change: Any) -> Any:
    call = {
        "batches": batches(4, 1),
        "recipe": Recipe(site_steps=2, block_steps=2, end_steps=2),
        **change,
    }
    return fit(rewritten(), call.pop("batches"), seconds=600, state_dir=folder, **call)


def copied(finished: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in finished.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_no_pickle_and_one_complete_state(finished: Path) -> None:
    names = sorted(p.name for p in finished.iterdir())
    assert len(names) == 2
    assert names[0] == "state.json"
    assert names[1].endswith(".safetensors")


@pytest.mark.parametrize("change", [{"seed": 1}, {"batches": batches(4, 2)}, {"recipe": Recipe()}])
def test_a_folder_of_another_fit_is_refused(finished: Path, change: dict[str, Any]) -> None:
    before = {p.name: p.read_bytes() for p in finished.iterdir()}
    with pytest.raises(FitError, match="belongs to another fit"):
        resume(finished, **change)
    assert {p.name: p.read_bytes() for p in finished.iterdir()} == before


@pytest.mark.parametrize("how", ["cut json", "cut tensors", "altered", "missing", "no state"])
def test_a_damaged_folder_is_refused(finished: Path, tmp_path: Path, how: str) -> None:
    folder = copied(finished, tmp_path)
    record, tensors = folder / "state.json", next(folder.glob("tensors-*"))
    raw = tensors.read_bytes()
    if how == "cut json":
        record.write_text(record.read_text()[:-20])
    elif how == "cut tensors":
        tensors.write_bytes(raw[: len(raw) // 2])
    elif how == "altered":
        tensors.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif how == "missing":
        tensors.unlink()
    else:
        data = json.loads(record.read_text())
        record.write_text(json.dumps({**data, "state": {"done": []}}))
    with pytest.raises(FitError, match=r"damaged|missing"):
        resume(folder)


def test_a_folder_with_other_files_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear diary")
    with pytest.raises(FitError, match=r"letter\.txt"):
        resume(tmp_path)
    with pytest.raises(FitError, match="is a file"):
        resume(tmp_path / "letter.txt")


def test_a_kill_between_the_two_files_leaves_the_older_state(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path, "key")
    folder.save(FitState(step=1, tensors={"now/a": torch.ones(2)}))
    (tmp_path / "tensors-2.safetensors").write_bytes(b"half")
    (tmp_path / "state.json.part").write_text("{")
    loaded = StateFolder(tmp_path, "key").load()
    assert loaded is not None
    assert loaded.step == 1
    assert torch.equal(loaded.tensors["now/a"], torch.ones(2))
