"""``python -m benchmarks``: time all workloads; results, page and plots. A killed run goes on."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import draw
from benchmarks.run import Settings, results_folder, run_workload
from benchmarks.store import complete, load_all, save
from benchmarks.table import page
from benchmarks.workloads import PEERS, WORKLOADS, Workload, workload_named
from codegen.target import usable_cores
from rewriter.engines import select

ROOT = Path(__file__).parent.parent


def main(argv: list[str] | None = None) -> int:
    told = _arguments(argv)
    chosen = [workload_named(n) for n in told.only] if told.only else list(WORKLOADS)
    names = tuple(e.name for e in select(told.engines))
    folder = results_folder(told.results)
    stored = load_all(folder)
    left = [w for w in chosen if told.again or not complete(stored.get(w.name), _rows(w, names))]
    share = (len([n for n in names if not n.startswith("ours")]) + 2) / (len(PEERS) + 2)
    estimate = sum(w.seconds for w in left) * (0.3 + 0.7 * share) * (0.7 + 0.12 * told.seconds)
    if told.list:
        for workload in chosen:
            print(f"{workload.name}{'' if workload in left else '  (done)'}")
    print(f"{len(left)} of {len(chosen)} workloads to run, about {estimate / 60:.0f} minutes")
    if told.list:
        return 0
    if left:
        _run(left, Settings(names, told.seconds, told.rounds, told.threads), folder)
    write_pages(folder, told.docs)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [n.strip() for n in text.split(",") if n.strip()]

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", type=names, help="workloads, by commas")
    parser.add_argument("--engines", type=names, default=list(PEERS), help="peers, by commas")
    parser.add_argument("--seconds", type=float, default=2.5, help="of timing per engine")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--again", action="store_true", help="run what is stored already anew")
    parser.add_argument("--list", action="store_true", help="show the workloads, run nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    return parser.parse_args(argv)


def _rows(workload: Workload, engines: tuple[str, ...]) -> tuple[str, ...]:
    peers = [n for n in engines if not n.startswith("ours")] if workload.peers else []
    return (*peers, *(v.row for v in workload.variants))


def _run(left: Sequence[Workload], settings: Settings, folder: Path) -> None:
    peaks = measure_peaks(settings.threads)
    print(f"peak {peaks['gflops']:.0f} GFLOP/s, {peaks['gbytes']:.1f} GB/s", flush=True)
    begun = time.perf_counter()
    for workload in left:
        start = time.perf_counter()
        result = run_workload(workload, settings, peaks, lambda text: print(text, flush=True))
        path = save(folder, result)
        now = time.perf_counter()
        print(f"{path.name}: {now - start:.0f} s, {(now - begun) / 60:.1f} min in all", flush=True)


def measure_peaks(threads: int) -> dict[str, Any]:
    """`benchmarks.peaks` in a process of its own: TVM sizes its pool once a process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peaks", str(threads)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    peaks: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def write_pages(folder: Path, docs: Path) -> None:
    """docs/performance.md and docs/images/ from what is stored in `folder`."""
    results = load_all(folder)
    images = draw(results, docs / "images")
    text = page(results, [p.relative_to(docs).as_posix() for p in images])
    (docs / "performance.md").write_text(text)
    print(f"wrote {docs / 'performance.md'} and {len(images)} plots")


if __name__ == "__main__":
    sys.exit(main())
