"""The folder of a session: torn lines, altered files, foreign sessions, the lock."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from codegen.trace_store import Best, KernelStore, Lock, Store, Trial
from passes.errors import TuningError

KEY = {"target": {"name": "cpu", "l1_bytes": 1}, "versions": {"apache-tvm": "1"}}
BEST = Best(3, [[], []], 1e-3, 2e-3, 0.5, 0.0, 4)


def kernel(folder: Path) -> KernelStore:
    store = KernelStore(folder / "00ff")
    store.put_func("{}")
    return store


def test_trials_come_back_as_they_were(tmp_path: Path) -> None:
    store = kernel(tmp_path)
    trials = [
        Trial(None, 0.1, 1e-3, 1e-3, 1.0),
        Trial([[["Split", ["l1", 2], [True], ["l2"]]], [[0, [2, 3]]]], 0.25, error="x\ny"),
    ]
    for trial in trials:
        store.append(trial)
    assert store.trials() == trials


def test_torn_last_line_is_ignored_and_cut_off_before_more_is_written(tmp_path: Path) -> None:
    store = kernel(tmp_path)
    store.append(Trial([1], 0.5, error="a"))
    with (store.folder / "records.jsonl").open("a") as file:
        file.write('{"trace": [2], "spent": 0.')
    assert [t.trace for t in store.trials()] == [[1]]
    store.mend()
    store.append(Trial([3], 0.5, error="b"))
    assert [t.trace for t in store.trials()] == [[1], [3]]


def test_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    store = kernel(tmp_path)
    (store.folder / "records.jsonl").write_text('{"trace": 1\n{"trace": null, "spent": 1.0}\n')
    with pytest.raises(TuningError, match="line 1 of records"):
        store.trials()


@pytest.mark.parametrize("field", ["trace", "ratio", "seconds", "max_abs_error"])
def test_altered_winner_is_not_given_out(tmp_path: Path, field: str) -> None:
    store = kernel(tmp_path)
    store.put_best(BEST)
    assert store.best() == BEST
    path = store.folder / "best.json"
    data = json.loads(path.read_text())
    data[field] = [[["Fuse"]], []] if field == "trace" else 0.123
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="altered"):
        store.best()


def test_winner_copied_to_another_kernel_is_void(tmp_path: Path) -> None:
    one, other = kernel(tmp_path), KernelStore(tmp_path / "00fe")
    one.put_best(BEST)
    other.put_func("{}")
    (other.folder / "best.json").write_bytes((one.folder / "best.json").read_bytes())
    with pytest.raises(ValueError, match="altered"):
        other.best()
    other.put_best(replace(BEST, ratio=0.4))
    assert other.best() == replace(BEST, ratio=0.4)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({**KEY, "versions": {"apache-tvm": "2"}}, "apache-tvm 1, this is apache-tvm 2"),
        ({**KEY, "target": {"name": "edge"}}, "not for 'edge'"),
        ({**KEY, "target": {"name": "cpu", "l1_bytes": 2}}, "with other properties"),
    ],
)
def test_session_of_another_target_or_version_is_refused(
    tmp_path: Path, other: dict[str, object], says: str
) -> None:
    Store.open(tmp_path / "s", KEY)
    assert Store.open(tmp_path / "s", KEY).kernels == {}
    with pytest.raises(TuningError, match=says):
        Store.open(tmp_path / "s", other)


def test_folders_that_are_no_session(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TuningError, match=r"holds other files \(notes.txt\)"):
        Store.open(tmp_path, KEY)
    with pytest.raises(TuningError, match="can not be written"):
        Store.open(tmp_path / "notes.txt", KEY)
    with pytest.raises(TuningError, match=r"holds no session.json"):
        Store.load(tmp_path / "nowhere")
    for text in ("{", "[]", '{"schema": 1, "key": {}, "kernels": {"a": {}}}'):
        (tmp_path / "session.json").write_text(text)
        with pytest.raises(TuningError, match="damaged"):
            Store.load(tmp_path)
    (tmp_path / "session.json").write_text('{"schema": 99, "key": {}, "kernels": {}}')
    with pytest.raises(TuningError, match="another version"):
        Store.load(tmp_path)


def test_lock_keeps_a_second_process_out_and_dies_with_its_holder(tmp_path: Path) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from codegen.trace_store import Lock\n"
        "with Lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, cwd=root
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(TuningError, match="another process is tuning here"):
            Lock(tmp_path)
        holder.kill()
        holder.wait()
    with Lock(tmp_path), pytest.raises(TuningError):
        Lock(tmp_path)
    Lock(tmp_path).__exit__()
