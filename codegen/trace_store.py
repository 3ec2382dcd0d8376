"""The folder of a tuning session: what was asked, every trial as it ended, the best per kernel.

    session.json            schema, key (target, versions, forms), kernels, the run in work
    lock                    held by the one process that tunes here
    <workload key>/func.json      the kernel before scheduling (TVM's JSON)
    <workload key>/records.jsonl  one line a trial, on disk before the next trial starts
    <workload key>/best.json      the checked winner with its own sha256

A killed process loses the trial in flight: a last line without its end is cut off when the folder
is opened to go on. Nothing here imports tvm.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passes.errors import TuningError

SCHEMA = 1
RECORD = "session.json"


@dataclass(frozen=True)
class Trial:
    """How one candidate went.

    `trace` is the schedule's trace as JSON (None for the first line, the default alone);
    `ratio` its time over the default's, measured in turns (None: see `error`); `spent` the wall
    seconds since the trial before, search and build included.
    """

    trace: Any
    spent: float
    seconds: float | None = None
    default_seconds: float | None = None
    ratio: float | None = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data, one line of records.jsonl."""
        return dict(vars(self))


@dataclass(frozen=True)
class Best:
    """A checked winner: trial number, trace, times, and the largest error of its outputs."""

    trial: int
    trace: Any
    seconds: float
    default_seconds: float
    ratio: float
    max_abs_error: float
    seeds: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


class KernelStore:
    """One kernel's part of a session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = folder.name

    def func_json(self) -> str:
        """The stored kernel as TVM's JSON."""
        return _read(self.folder / "func.json")

    def put_func(self, text: str) -> None:
        """Store the kernel, once."""
        if not (self.folder / "func.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_beside(self.folder / "func.json", text)

    def trials(self) -> list[Trial]:
        """All whole lines; `TuningError` for a damaged line that is not the torn last one."""
        path = self.folder / "records.jsonl"
        if not path.exists():
            return []
        lines = _read(path).split("\n")[:-1]  # what follows the last line end is a torn line
        made = []
        for number, line in enumerate(lines, 1):
            try:
                made.append(Trial(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise TuningError(
                    f"session {self.folder.parent}: line {number} of {path.name} in "
                    f"{self.folder.name} is damaged; delete that folder to tune the kernel anew"
                ) from error
        return made

    def mend(self) -> None:
        """Cut off a last line that a kill left without its end."""
        path = self.folder / "records.jsonl"
        if not path.exists():
            return
        with path.open("r+b") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                file.truncate(whole)
                os.fsync(file.fileno())

    def append(self, trial: Trial) -> None:
        """Add one line and wait until it is on disk."""
        line = json.dumps(trial.to_json(), separators=(",", ":")) + "\n"
        with (self.folder / "records.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def best(self) -> Best | None:
        """The checked winner, None if there is none; ValueError if the file was altered."""
        path = self.folder / "best.json"
        if not path.exists():
            return None
        data = json.loads(_read(path))
        if not isinstance(data, dict) or data.pop("sha256", None) != self._digest(data):
            raise ValueError("best.json was altered or is damaged")
        return Best(**data)

    def put_best(self, best: Best) -> None:
        """Replace the winner in one step."""
        data = best.to_json()
        write_beside(
            self.folder / "best.json", json.dumps({**data, "sha256": self._digest(data)}) + "\n"
        )

    def _digest(self, data: Mapping[str, Any]) -> str:
        """Over the winner and the kernel it belongs to: moved to another kernel it is void."""
        text = json.dumps([self.key, dict(data)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """A session's folder. `record` is session.json; changes are kept by `save`."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder, self.record = folder, record

    @property
    def kernels(self) -> dict[str, dict[str, Any]]:
        """{workload key: {"name", "calls"}}."""
        kernels: dict[str, dict[str, Any]] = self.record["kernels"]
        return kernels

    def kernel(self, key: str) -> KernelStore:
        """The part of one kernel."""
        return KernelStore(self.folder / key)

    def save(self) -> None:
        """Write session.json (beside, then renamed)."""
        write_beside(self.folder / RECORD, json.dumps(self.record, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Store:
        """An existing session; `TuningError` if there is none or it is damaged."""
        if not (folder / RECORD).is_file():
            raise TuningError(
                f"session {folder}: holds no {RECORD}; make one with `rewriter tune --session`"
            )
        damaged = f"session {folder}: {RECORD} is damaged; delete the folder to start anew"
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TuningError(damaged) from error
        if not isinstance(record, dict) or not _whole(record):
            raise TuningError(damaged)
        if record["schema"] != SCHEMA:
            raise TuningError(f"session {folder}: written by another version of this tool")
        return cls(folder, record)

    @classmethod
    def open(cls, folder: Path, key: Mapping[str, Any]) -> Store:
        """The session in `folder`, made if the folder is new or empty.

        Raises:
            TuningError: it was made for another target or TVM, or the folder holds other files.
        """
        if (folder / RECORD).exists():
            store = cls.load(folder)
            store.require(key)
            return store
        try:
            folder.mkdir(parents=True, exist_ok=True)
            foreign = [p.name for p in folder.iterdir() if p.name != "lock"]
            if foreign:
                raise TuningError(
                    f"session {folder}: holds other files ({', '.join(sorted(foreign)[:3])}); "
                    "name an empty folder"
                )
            store = cls(folder, {"schema": SCHEMA, "key": dict(key), "kernels": {}, "run": None})
            store.save()
        except OSError as error:
            raise TuningError(
                f"session {folder}: can not be written ({error.strerror or error})"
            ) from error
        return store

    def require(self, key: Mapping[str, Any]) -> None:
        """`TuningError` if the session was made for another target or by another TVM."""
        mine = self.record["key"]
        if mine.get("versions") != key["versions"]:
            raise TuningError(
                f"session {self.folder}: was made with {_words(mine.get('versions'))}, this is "
                f"{_words(key['versions'])}; schedules do not carry over, name another folder"
            )
        if mine.get("target") != json.loads(json.dumps(key["target"])):
            name, other = mine.get("target", {}).get("name"), key["target"].get("name")
            how = "with other properties" if name == other else f"not for {other!r}"
            raise TuningError(
                f"session {self.folder}: was made for the target {name!r}, {how} (processor "
                "features, caches and cores count); name another folder"
            )


class Lock:
    """Held while a process tunes in a folder; freed by the system however the process ends."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise TuningError(
                f"session {folder}: another process is tuning here; wait for it or name "
                "another folder"
            ) from error

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._file.close()


def write_beside(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TuningError(f"session file {path} can not be read ({error})") from error


def _whole(record: Mapping[str, Any]) -> bool:
    kernels = record.get("kernels")
    return (
        isinstance(record.get("schema"), int)
        and isinstance(record.get("key"), dict)
        and isinstance(kernels, dict)
        and all(isinstance(k, dict) and {"name", "calls"} <= set(k) for k in kernels.values())
    )


def _words(versions: Any) -> str:
    return ", ".join(f"{n} {v}" for n, v in dict(versions or {}).items()) or "unknown versions"
