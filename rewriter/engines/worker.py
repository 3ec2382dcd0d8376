"""One engine in its own process: ``python -m rewriter.engines.worker ENGINE MODEL ...``.

Speaks JSON lines: says ``{"state": "ready", ...}`` (or skipped, failed), then for each line
``{"seconds": s, "least": n, "most": m}`` on stdin answers ``{"ms": [...]}``. It ends when stdin
does, so it never outlives its parent. Inputs and outputs go through .npz files; nothing is
pickled. Engines share no process because their thread pools spin and steal each other's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rewriter.engines import Call, Job, engines


def main(argv: list[str] | None = None) -> int:
    """Serve until stdin ends."""
    told = _arguments(argv)
    reply = _own_stdout()
    engine = engines()[told.engine]
    missing = engine.missing()
    if missing:
        _say(reply, {"state": "skipped", "why": missing})
        return 0
    try:
        with np.load(told.inputs, allow_pickle=False) as archive:
            inputs = {name: archive[name] for name in archive.files}
        job = Job(told.model, inputs, told.threads, told.folder, json.loads(told.options))
        call, ready = _prepare(engine.prepare, job, told)
    except Exception as error:
        traceback.print_exc()
        _say(reply, {"state": "failed", "why": _first_line(error)})
        return 1
    _say(reply, ready)
    return _serve(call, reply)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="rewriter.engines.worker")
    parser.add_argument("engine", choices=sorted(engines()))
    parser.add_argument("model")
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--options", default="{}")
    return parser.parse_args(argv)


def _own_stdout() -> TextIO:
    """The real stdout for replies; whatever a library prints goes to stderr."""
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return reply


def _say(reply: TextIO, data: dict[str, Any]) -> None:
    reply.write(json.dumps(data) + "\n")
    reply.flush()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(": ")


def _prepare(prepare: Any, job: Job, told: argparse.Namespace) -> tuple[Call, dict[str, Any]]:
    start, resident = time.perf_counter(), _resident_mb()
    call = prepare(job)
    outputs = call()  # compiles, for engines that compile at the first call
    seconds = time.perf_counter() - start
    _save(told.outputs, [np.array(o) for o in outputs])
    for _ in range(told.warmup):
        call()
    grown = _resident_mb() - resident
    ready = {"state": "ready", "prepare_s": seconds, "outputs": len(outputs)}
    return call, {**ready, "resident_mb": grown}


def _resident_mb() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e6


def _save(path: Path, outputs: list[Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **{f"output_{i:04d}": array for i, array in enumerate(outputs)})


def _serve(call: Call, reply: TextIO) -> int:
    for line in sys.stdin:
        order = json.loads(line)
        try:
            times = _timed(call, order["seconds"], order["least"], order["most"])
        except Exception as error:
            traceback.print_exc()
            _say(reply, {"state": "failed", "why": _first_line(error)})
            return 1
        _say(reply, {"ms": times})
    return 0


def _timed(call: Call, seconds: float, least: int, most: int) -> list[float]:
    """Milliseconds of single calls until `seconds` are over (at least `least`, at most `most`)."""
    call()  # not counted: caches and a pool that slept while the others ran
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < most and (len(times) < least or time.perf_counter() < end):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    return times


if __name__ == "__main__":
    sys.exit(main())
