"""The parent's end of rewriter/engines/worker.py: start, ask, stop; never waits for ever."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS")


class WorkerError(Exception):
    """A worker that died, said nothing in time, or something that is not JSON."""


class WorkerProcess:
    """One engine's process; its stderr goes to `log`."""

    def __init__(self, arguments: Sequence[str], threads: int, log: Path) -> None:
        """Start ``python -m rewriter.engines.worker`` with `arguments`."""
        environment = {**os.environ, **dict.fromkeys(_POOLS, str(threads))}
        environment.setdefault("TVM_BIND_THREADS", "0")
        environment["TOKENIZERS_PARALLELISM"] = "false"
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rewriter.engines.worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
            )
        self._rest = b""

    def ask(self, order: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        """Send `order` (if any) and wait for one line of JSON; `WorkerError` if none comes."""
        if order is not None:
            self._send(order)
        end = time.monotonic() + timeout
        while b"\n" not in self._rest:
            self._read(end, timeout)
        line, self._rest = self._rest.split(b"\n", 1)
        try:
            data = json.loads(line)
        except ValueError as error:
            raise WorkerError(f"said {line[:80]!r}, which is not JSON") from error
        if not isinstance(data, dict):
            raise WorkerError(f"said {line[:80]!r}, which is not an object")
        return data

    def _send(self, order: dict[str, Any]) -> None:
        try:
            pipe = _open(self.process.stdin)
            pipe.write(json.dumps(order).encode() + b"\n")
            pipe.flush()
        except OSError as error:
            raise WorkerError(self._death()) from error

    def _read(self, end: float, timeout: float) -> None:
        pipe = _open(self.process.stdout)
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise WorkerError(f"gave no answer in {timeout:.0f} s")
        piece = os.read(pipe.fileno(), 65536)
        if not piece:
            raise WorkerError(self._death())
        self._rest += piece

    def _death(self) -> str:
        try:
            code: int | None = self.process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        lines = [ln for ln in self.log.read_text(errors="replace").splitlines() if ln.strip()]
        last = f": {lines[-1].strip()[:200]}" if lines else ""
        return f"its process ended (exit status {code}){last}"

    def stop(self) -> None:
        """End the process: its stdin closes, and it is killed if that does not help."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise WorkerError("has no pipe")
    return pipe
