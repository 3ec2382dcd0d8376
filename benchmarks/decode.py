"""``python -m benchmarks.decode``: tokens a second while a language model generates, form by form.

All forms generate in turns, a few tokens each, so that what else the machine does meets them alike.
A round is one walk from the first token to the last mark; it is stored as soon as it is done, so a
killed run goes on with the rounds that are missing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode_page import write_page
from benchmarks.store import load_all, save
from codegen.decoding import Decoder
from codegen.runtime import load
from codegen.target import usable_cores

ROOT = Path(__file__).parent.parent
FORMS = ("elu", "hedgehog", "exact")
MARKS = (128, 256, 512, 1024, 2048, 4096, 8192)
WINDOW, RUN = 64, 8  # tokens timed before each mark, tokens a form generates at its turn


def main(argv: list[str] | None = None) -> int:
    told = _arguments(argv)
    from benchmarks.run import results_folder

    folder = results_folder(told.results) / "decoding"
    marks = [m for m in MARKS if m <= told.tokens]
    name = f"{told.model}-{told.threads}threads"
    stored = {} if told.again else load_all(folder).get(name, {})
    rounds = list(stored.get("rounds", ())) if stored.get("marks") == marks else []
    print(f"{len(rounds)} of {told.rounds} rounds are done", flush=True)
    if len(rounds) < told.rounds:
        with tempfile.TemporaryDirectory(prefix="decode-") as scratch:
            paths = {f: compiled(told.model, f, marks[-1], Path(scratch)) for f in FORMS}
            while len(rounds) < told.rounds:
                start = time.perf_counter()
                rounds.append(one_round(paths, marks, told.threads))
                save(folder, result(name, told.model, told.threads, marks, rounds))
                print(f"round {len(rounds)}: {time.perf_counter() - start:.0f} s", flush=True)
    done = result(name, told.model, told.threads, marks, rounds)
    print(write_page(done, told.docs))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--model", default="llama-tiny", help="MODEL of `rewriter compile`")
    parser.add_argument("--tokens", type=int, default=MARKS[-1], help="the last mark")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--again", action="store_true", help="forget the rounds that are stored")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    return parser.parse_args(argv)


def compiled(model: str, form: str, tokens: int, folder: Path) -> Path:
    """The artifact of one form, made in a process of its own: none of its pools is here later."""
    path = folder / f"{form}.rwa"
    command = [sys.executable, "-m", "rewriter", "compile", model, "--decode", "--form", form]
    command += ["--tokens", "128", "--max-length", str(tokens + 1), "-o", str(path)]
    print(f"compile {form}", flush=True)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=1800, env=dict(os.environ)
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr.strip()[-2000:]}")
    return path


def one_round(
    paths: Mapping[str, Path], marks: Sequence[int], threads: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds a token, of each turn in the window before each mark, by form and mark."""
    artifacts = {form: load(path, threads=threads) for form, path in paths.items()}
    walks = {form: Walk(Decoder(artifact)) for form, artifact in artifacts.items()}
    times: dict[str, dict[str, list[float]]] = {form: {} for form in paths}
    for mark in marks:
        for walk in walks.values():
            walk.forward(mark - WINDOW - walk.made)
        for form in paths:
            times[form][str(mark)] = []
        for _ in range(WINDOW // RUN):
            for form, walk in walks.items():
                times[form][str(mark)].append(walk.forward(RUN))
    for artifact in artifacts.values():
        artifact.close()
    return times


class Walk:
    """One greedy generation from a prompt of one token."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.made = decoder, 0
        self.last = np.ones((decoder.facts.batch, 1), np.int64)

    def forward(self, tokens: int) -> float:
        """Generate so many tokens; milliseconds a token."""
        if tokens <= 0:
            return 0.0
        start = time.perf_counter()
        new = self.decoder.generate(self.last, tokens)
        spent = time.perf_counter() - start
        self.last = new[:, -1:]
        self.made += tokens
        return 1e3 * spent / tokens


def result(
    name: str, model: str, threads: int, marks: Sequence[int], rounds: Sequence[Any]
) -> dict[str, Any]:
    """Plain data: the rounds, and of all of them the median and best milliseconds a token."""
    from rewriter.timings import machine

    forms = list(rounds[0]) if rounds else []
    return {
        "workload": name,
        "model": model,
        "threads": threads,
        "marks": list(marks),
        "rounds": list(rounds),
        "machine": machine(),
        "median_ms": {f: [statistics.median(_all(rounds, f, m)) for m in marks] for f in forms},
        "best_ms": {f: [min(_all(rounds, f, m)) for m in marks] for f in forms},
    }


def _all(rounds: Sequence[Any], form: str, mark: int) -> list[float]:
    return [ms for r in rounds for ms in r[form][str(mark)]]


if __name__ == "__main__":
    sys.exit(main())
