"""One workload: compile and verify our artifacts, time all engines taking turns, store JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.workloads import Variant, Workload
from codegen.profile import flops_of
from passes.errors import RewriterError
from rewriter.bench import Subject, model_inputs, time_subject
from rewriter.engines import select
from rewriter.timings import machine

SCHEMA = 1
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How long and with what: seconds of timing per engine over all rounds."""

    engines: tuple[str, ...]
    seconds: float = 2.5
    rounds: int = 5
    threads: int = 2


def results_folder(root: Path) -> Path:
    """The folder for this machine's results: the processor's name and the cores in use."""
    told = machine()
    name = re.sub(r"[^a-z0-9]+", "-", str(told["cpu"]).lower()).strip("-") or "unknown"
    return root / f"{name}-{told['usable_cores']}cores"


def run_workload(
    workload: Workload, settings: Settings, peaks: Mapping[str, Any], say: Say
) -> dict[str, Any]:
    """The result as plain data; a variant that can not be compiled is a failed row."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        folder = Path(scratch)
        made, failed = _compile_all(workload, settings, folder, say)
        result = _time(workload, made, settings, folder, say) if made else {"engines": []}
        profile = profiled(next(iter(made.values()))["path"], settings.threads) if made else {}
    exact = made.get("ours", {}).get("report", {}).get("flops", 0)
    rows = [_row(row, made, peaks, exact) for row in result["engines"]]
    rows += [{"engine": n, "label": n, "status": "failed", "why": w} for n, w in failed.items()]
    return {
        **result,
        "schema": SCHEMA,
        "workload": workload.name,
        "model": workload.model,
        "options": dict(workload.options),
        "tokens": workload.tokens,
        "seconds": settings.seconds,
        "peaks": dict(peaks),
        "profile": profile,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "engines": rows,
    }


def _compile_all(
    workload: Workload, settings: Settings, folder: Path, say: Say
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    made: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for variant in workload.variants:
        say(f"{workload.name}: compile {variant.row}")
        path = folder / f"{variant.row}.rwa"
        start = time.perf_counter()
        try:
            report = compile_variant(workload, variant, path, settings.threads)
        except RewriterError as error:
            failed[variant.row] = str(error).splitlines()[0]
            say(f"{workload.name}: {variant.row} failed: {failed[variant.row]}")
            continue
        seconds = time.perf_counter() - start
        made[variant.row] = {"path": path, "report": report, "compile_s": seconds}
    return made, failed


def compile_variant(
    workload: Workload, variant: Variant, path: Path, threads: int
) -> dict[str, Any]:
    """Compile in a process of its own, so that none of its memory or pools is here later.

    Raises:
        RewriterError: with the last line the process said.
    """
    order = {
        "model": workload.model,
        "load": dict(workload.options),
        "path": str(path),
        "threads": threads,
        "options": dict(variant.options),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_one", json.dumps(order)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RewriterError((lines or [f"exit status {done.returncode}"])[-1])
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def _time(
    workload: Workload,
    made: Mapping[str, dict[str, Any]],
    settings: Settings,
    folder: Path,
    say: Say,
) -> dict[str, Any]:
    from codegen.archive import open_artifact

    first, *others = made
    specs = open_artifact(made[first]["path"]).manifest.inputs
    options = dict(workload.options)
    subject = Subject(
        workload.name,
        model_inputs(workload.model, options, specs),
        made[first]["path"],
        workload.model if workload.peers else None,
        options,
        more={name: made[name]["path"] for name in others},
    )
    names = [n for n in settings.engines if not n.startswith("ours")]
    timed = time_subject(
        subject,
        select(names),
        folder,
        settings.threads,
        settings.rounds,
        settings.seconds,
        lambda stage, *_: say(f"{workload.name}: {stage}"),
    ).to_json()
    if first != "ours":  # the first row is always called "ours"; its variant may be another
        for row in timed["engines"]:
            if row["engine"] == "ours":
                row.update(engine=first, label=f"this artifact, {first.removeprefix('ours-')}")
    return timed


def profiled(path: Path, threads: int) -> dict[str, Any]:
    """What `rewriter bench --profile --json` says; {} if it fails."""
    command = [sys.executable, "-m", "rewriter", "bench", str(path), "--profile", "--json"]
    command += ["--seconds", "2", "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    said: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return said


def _row(
    row: dict[str, Any], made: Mapping[str, dict[str, Any]], peaks: Mapping[str, Any], exact: int
) -> dict[str, Any]:
    """The row with what is known: our verification, the work, the share of the peak.

    `exact` is the work of the exact artifact, which is that of the peers.
    """
    known = made.get(row["engine"])
    more: dict[str, Any] = {} if known is None else _of_artifact(known)
    flops = more.get("flops", exact)
    if row.get("median_ms") and flops:
        more["gflops"] = flops / row["median_ms"] / 1e6
        more["share_of_peak"] = more["gflops"] / peaks["gflops"]
    return {**row, **more}


def _of_artifact(known: Mapping[str, Any]) -> dict[str, Any]:
    report = known["report"]
    compiled, facts = report.get("compiled") or {}, report.get("artifact") or {}
    return {
        "verified": bool(compiled.get("ok")),
        "compiled_max_abs": compiled.get("max_abs"),
        "compile_s": round(known["compile_s"], 2),
        "compile_stages": facts.get("seconds", {}),
        "flops": report["flops"],
        "peak_memory": facts.get("peak_memory"),
    }


def work(kernels: Sequence[Mapping[str, Any]]) -> int:
    """Floating additions, multiplications and divisions of all calls, from their OpCounts."""
    return sum(int(k.get("calls", 1)) * flops_of(k["ops"]) for k in kernels if k.get("ops"))
