"""bench: a model or an artifact against other engines, in one session, taking turns.

Every engine runs in its own process (their thread pools spin and would fight) on the same
inputs, in interleaved rounds, so that a change of the machine's load hits all of them.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from passes.errors import InputError, UsageError
from rewriter.engines import Array, Engine, engines, select
from rewriter.engines.process import WorkerError, WorkerProcess
from rewriter.timings import BenchResult, EngineTiming, machine, max_abs_error, statistics
from rewriter.wording import BUSY

Progress = Callable[..., None]
PREPARE_TIMEOUT = 900.0
PAUSE = 0.15  # a pool spins for about 0.1 s after its last call
WARMUP = 3
MOST = 2000  # calls of one engine in one round


@dataclass
class Subject:
    """What is timed: `artifact` for ours, `model` (a MODEL) for the others; inputs by name.

    `more` are further artifacts of the same model, by the name of their row ("ours-hedgehog").
    """

    name: str
    inputs: dict[str, Array]
    artifact: Path | None
    model: str | None
    options: dict[str, Any] = field(default_factory=dict)
    approximate: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    more: dict[str, Path] = field(default_factory=dict)


@dataclass
class _Entry:
    """One engine of a running bench."""

    engine: Engine
    row: EngineTiming
    worker: WorkerProcess | None = None
    outputs: Path | None = None
    ms: list[float] = field(default_factory=list)
    artifact: Path | None = None

    def fail(self, why: str) -> None:
        self.row = replace(self.row, status="failed", why=why)
        self.stop()

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()
            self.worker = None


def bench(
    subject: str | Path,
    *,
    model: str | None = None,
    engines: Sequence[str] | None = None,
    threads: int | None = None,
    repeats: int = 7,
    seconds: float = 4.0,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Time `subject` against other engines.

    Args:
        subject: the path of an artifact (.rwa), or a MODEL, which is compiled first, all
            attentions exact.
        model: the MODEL an artifact was made from; by default what the artifact says.
        engines: names or groups (`rewriter.engines.engines`); by default all. "ours" is always
            among them, and "eager" where there is a model, as the errors are measured against it.
        threads: of every engine; by default the cores this process may use.
        repeats: interleaved rounds; seconds: of timing per engine over all rounds.
        options: `load_model`'s tokens, batch, image, attn (for a MODEL).
        progress: called as progress(stage, done, total).

    Returns:
        A row for every engine asked for; one that is not installed is "skipped" with the reason,
        one that broke is "failed" with the reason.

    Raises:
        UnknownName: no such engine. UsageError, ModelError, ArtifactError: a bad subject.
    """
    from codegen.target import usable_cores

    _check_numbers(threads, repeats, seconds)
    chosen = select(engines) if engines is not None else select(_all_names())
    threads = min(threads or usable_cores(), usable_cores())
    told = progress or (lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="rewriter-bench-") as scratch:
        folder = Path(scratch)
        thing = _subject(subject, model, dict(options or {}), folder, engines is not None)
        return time_subject(thing, chosen, folder, threads, repeats, seconds, told)


def time_subject(
    thing: Subject,
    chosen: Sequence[Engine],
    folder: Path,
    threads: int,
    repeats: int,
    seconds: float,
    told: Progress,
) -> BenchResult:
    """`bench` for a subject that is ready; `folder` is for scratch files."""
    entries = _entries(chosen, thing)
    try:
        _start(entries, thing, threads, folder, told)
        load = _other_load()
        _rounds(entries, repeats, seconds, told)
        outputs = {e.row.engine: _outputs(e) for e in entries}
    finally:
        for entry in entries:
            entry.stop()
    return _result(entries, outputs, thing, threads, repeats, load)


def _check_numbers(threads: int | None, repeats: int, seconds: float) -> None:
    if threads is not None and threads < 1:
        raise UsageError(f"threads: {threads} given, at least 1 expected")
    if repeats < 1:
        raise UsageError(f"repeats: {repeats} given, at least 1 expected")
    if not seconds > 0:
        raise UsageError(f"seconds: {seconds} given, more than 0 expected")


def _all_names() -> list[str]:
    return list(engines())


# --- the subject --------------------------------------------------------------------------------


def _subject(
    subject: str | Path, model: str | None, options: dict[str, Any], folder: Path, asked: bool
) -> Subject:
    if str(subject).endswith(".rwa"):
        return _artifact_subject(Path(subject), model, options, asked)
    from rewriter.api import compile as compile_artifact
    from rewriter.models import load_model

    loaded = load_model(str(subject), **options)
    path = folder / "ours.rwa"
    compile_artifact(loaded.model, loaded.example_inputs, path=path, name=loaded.name)
    return Subject(loaded.name, _numpy(loaded.example_inputs), path, str(subject), options)


def _artifact_subject(
    path: Path, model: str | None, options: dict[str, Any], asked: bool
) -> Subject:
    from codegen.archive import open_artifact

    opened = open_artifact(path)
    specs = opened.manifest.inputs
    forms = sorted(
        {row["form"] for row in opened.report.get("sites", ()) if not row.get("exact", True)}
    )
    thing = Subject(str(path), {}, path, None, {}, tuple(forms))
    spec = model or opened.manifest.name
    try:
        thing.options = {**_sizes(specs), **options}
        thing.inputs = model_inputs(spec, thing.options, specs)
        thing.model = spec
    except UsageError as error:
        if asked or model is not None:
            raise UsageError(
                f"{path}: the other engines need the model it was made from; {error}"
            ) from error
        thing.inputs = random_inputs(specs)
        thing.notes.append(f"only the artifact was timed: its model was not found ({error})")
    return thing


def _sizes(specs: Sequence[Any]) -> dict[str, Any]:
    """tokens, batch and image of `load_model` that give inputs like `specs`."""
    for spec in specs:
        if len(spec.shape) == 2 and np.issubdtype(np.dtype(spec.dtype), np.integer):
            return {"batch": spec.shape[0], "tokens": spec.shape[1]}
        if len(spec.shape) == 4:
            return {"batch": spec.shape[0], "image": spec.shape[-1]}
    return {}


def model_inputs(model: str, options: Mapping[str, Any], specs: Sequence[Any]) -> dict[str, Array]:
    """`model`'s example inputs as arrays by name; `InputError` unless they fit `specs`."""
    from rewriter.models import load_model

    inputs = _numpy(load_model(model, **options).example_inputs)
    for spec in specs:
        shape = inputs[spec.name].shape if spec.name in inputs else None
        if shape != tuple(spec.shape):
            raise InputError(
                f"model {model!r}: its input {spec.name!r} has shape {shape}, the artifact takes "
                f"{tuple(spec.shape)}"
            )
    return inputs


def random_inputs(specs: Sequence[Any]) -> dict[str, Array]:
    """Arrays by name that fit `specs`: normal floats, whole numbers from the spec's range."""
    draw = np.random.default_rng()
    made: dict[str, Array] = {}
    for spec in specs:
        dtype = np.dtype(spec.dtype)
        if np.issubdtype(dtype, np.floating):
            made[spec.name] = draw.standard_normal(spec.shape).astype(dtype)
        else:
            low = 0 if spec.low is None else spec.low
            high = 1 if spec.high is None else spec.high
            made[spec.name] = draw.integers(low, high, spec.shape, endpoint=True).astype(dtype)
    return made


def _numpy(tensors: Mapping[str, Any]) -> dict[str, Array]:
    from rewriter.verify import to_numpy

    return {name: to_numpy(tensor) for name, tensor in tensors.items() if tensor is not None}


# --- running ------------------------------------------------------------------------------------


def _entries(chosen: Sequence[Engine], thing: Subject) -> list[_Entry]:
    wanted = {e.name: e for e in select(["ours"])}
    if thing.model is not None:
        wanted.update({e.name: e for e in [*select(["eager"]), *chosen]})
    made = [_Entry(e, EngineTiming(e.name, e.label, "ok")) for e in wanted.values()]
    made[0].artifact = thing.artifact
    ours = made[0].engine
    for name, path in thing.more.items():
        label = f"this artifact, {name.removeprefix('ours-')}"
        made.append(_Entry(ours, EngineTiming(name, label, "ok"), artifact=path))
    return made


def _start(
    entries: Sequence[_Entry], thing: Subject, threads: int, folder: Path, told: Progress
) -> None:
    """Start and warm up one after the other: they load and compile on all cores."""
    np.savez(folder / "inputs.npz", **thing.inputs)  # type: ignore[arg-type]
    for i, entry in enumerate(entries):
        told(f"prepare {entry.engine.label}", i, len(entries))
        missing = entry.engine.missing()
        if missing:
            entry.row = replace(entry.row, status="skipped", why=missing)
            continue
        name = entry.row.engine
        subject = str(entry.artifact or thing.model)
        entry.outputs = folder / f"{name}.npz"
        arguments = [entry.engine.name, subject, "--inputs", str(folder / "inputs.npz")]
        arguments += ["--outputs", str(entry.outputs), "--folder", str(folder)]
        arguments += ["--threads", str(threads), "--warmup", str(WARMUP)]
        arguments += ["--options", json.dumps(thing.options)]
        entry.worker = WorkerProcess(arguments, threads, folder / f"{name}.log")
        try:
            said = entry.worker.ask(None, PREPARE_TIMEOUT)
        except WorkerError as error:
            entry.fail(str(error))
            continue
        _take(entry, said)


def _take(entry: _Entry, said: Mapping[str, Any]) -> None:
    if said.get("state") == "ready":
        entry.row = replace(
            entry.row, prepare_s=said["prepare_s"], resident_mb=said.get("resident_mb")
        )
    elif said.get("state") == "skipped":
        entry.row = replace(entry.row, status="skipped", why=said["why"])
        entry.stop()
    else:
        entry.fail(str(said.get("why")))


def _rounds(entries: Sequence[_Entry], repeats: int, seconds: float, told: Progress) -> None:
    for turn in range(repeats):
        told("time", turn, repeats)
        running = [e for e in entries if e.worker is not None]
        random.shuffle(running)  # no engine always follows the same other one
        for entry in running:
            time.sleep(PAUSE)
            _time_once(entry, seconds / repeats)
    told("done", repeats, repeats)


def _time_once(entry: _Entry, seconds: float) -> None:
    assert entry.worker is not None
    order = {"seconds": seconds, "least": 2, "most": MOST}
    try:
        said = entry.worker.ask(order, 120 + 10 * seconds)
    except WorkerError as error:
        entry.fail(str(error))
        return
    if "ms" in said:
        entry.ms.extend(said["ms"])
    else:
        entry.fail(str(said.get("why")))


def _other_load() -> float:
    """Cores in use while all our engines wait."""
    import psutil

    time.sleep(PAUSE)
    return float(psutil.cpu_percent(0.4)) / 100 * (psutil.cpu_count() or 1)


def _outputs(entry: _Entry) -> list[Array]:
    if entry.outputs is None or not entry.outputs.exists():
        return []
    with np.load(entry.outputs, allow_pickle=False) as archive:
        return [archive[name] for name in archive.files]


# --- the result ---------------------------------------------------------------------------------


def _result(
    entries: Sequence[_Entry],
    outputs: Mapping[str, list[Array]],
    thing: Subject,
    threads: int,
    repeats: int,
    load: float,
) -> BenchResult:
    from rewriter.report import versions

    rows = [_row(e, outputs) for e in entries]
    ours = next((r.median_ms for r in rows if r.engine == "ours"), None)
    rows = [replace(r, ratio=r.median_ms / ours) if r.median_ms and ours else r for r in rows]
    return BenchResult(
        subject=thing.name,
        threads=threads,
        engines=tuple(rows),
        rounds=repeats,
        warmup=WARMUP,
        load=load,
        machine=machine(),
        inputs={n: f"{a.dtype} {list(a.shape)}" for n, a in thing.inputs.items()},
        versions=versions(),
        notes=(*thing.notes, *_doubts(rows, thing, load)),
    )


def _row(entry: _Entry, outputs: Mapping[str, list[Array]]) -> EngineTiming:
    row = replace(entry.row, **statistics(entry.ms)) if entry.row.status == "ok" else entry.row
    want, got = outputs.get("eager"), outputs[entry.row.engine]
    if want and got and row.status == "ok":
        error = max_abs_error(got, want)
        why = row.why or ("" if error is not None else "other outputs than eager's")
        row = replace(row, max_abs_error=error, why=why)
    return row


def _ours(row: EngineTiming) -> bool:
    return row.engine.split("-")[0] == "ours"


def _doubts(rows: Sequence[EngineTiming], thing: Subject, load: float) -> list[str]:
    notes = []
    if load > BUSY:
        notes.append(f"other processes used {load:.1f} cores just before: times may be too high")
    if thing.approximate:
        notes.append(
            f"the artifact approximates attention ({', '.join(thing.approximate)}); the other "
            "engines compute the original model, so its error against eager is the approximation's"
        )
    slower = [r.label for r in rows if r.ratio is not None and r.ratio <= 1 and not _ours(r)]
    if slower:
        notes.append(f"the artifact is NOT faster than {', '.join(slower)}")
    return notes
