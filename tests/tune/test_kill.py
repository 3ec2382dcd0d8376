"""kill -9 in the middle of tuning: everything but the trial in flight is there and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from codegen.trace_store import Lock
from passes.errors import TuningError
from rewriter.api import tune
from rewriter.session import TuningSession
from tests.tune.models import two

ROOT = Path(__file__).parents[2]
MINUTES = 0.25


def lines(folder: Path) -> dict[str, list[str]]:
    """The whole lines of every kernel's records."""
    found = {}
    for path in sorted(folder.glob("*/records.jsonl")):
        found[path.parent.name] = [s for s in path.read_text().split("\n")[:-1] if s]
    return found


def count(folder: Path) -> int:
    return sum(len(v) for v in lines(folder).values())


def wait_for(folder: Path, records: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 200
    while count(folder) < records:
        assert process.poll() is None, "tuning ended early"
        assert time.monotonic() < end, "no trials"
        time.sleep(0.01)


def go_on(folder: Path) -> TuningSession:
    model, inputs = two()
    return tune(model, inputs, session=folder, minutes=MINUTES, on_noop="ok")


@pytest.mark.slow
def test_killed_session_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "session"
    command = [sys.executable, "-m", "tests.tune.run_tune", str(folder), str(MINUTES)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        wait_for(folder, 3, process)
        with pytest.raises(TuningError, match="another process is tuning here"):
            Lock(folder)
        workers = psutil.Process(process.pid).children(recursive=True)
        seen = count(folder)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert workers
    psutil.wait_procs(workers, timeout=20)
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers)
    kept = lines(folder)
    assert sum(map(len, kept.values())) >= seen
    for text in (line for v in kept.values() for line in v):
        json.loads(text)

    run = json.loads((folder / "session.json").read_text())["run"]
    assert not run["finished"]
    used_before = sum(json.loads(s)["spent"] for v in kept.values() for s in v)
    session = go_on(folder)
    after = lines(folder)
    for key, old in kept.items():
        assert after[key][: len(old)] == old, "records from before the kill must stay"
    assert count(folder) > sum(map(len, kept.values()))
    assert session.state == "finished"
    # One run of MINUTES in all: the time before the kill counts.
    used = sum(k.spent for k in session.kernels)
    assert used_before < used
    assert used == pytest.approx(60 * MINUTES, abs=25)
    assert json.loads((folder / "session.json").read_text())["run"]["from"] == 0
