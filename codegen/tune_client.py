"""A tuning worker seen from the process that tunes: asked with a timeout, replaced if it dies."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codegen.target import Target, usable_cores

# Starting imports TVM, which takes seconds on a busy machine.
START_SECONDS = 120.0


class WorkerDied(Exception):
    """The worker ended or hung; the message says which. It has been stopped."""


class Refused(Exception):
    """The worker's answer was an error (a candidate that does not build, differs, ...)."""


class Client:
    """Talks to one worker process; starts it when needed, with the kernel that is open."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None
        self._open = ""
        self._buffer = b""

    def open(self, func_json: str, timeout: float) -> float:
        """Make a kernel the open one; seconds of its default. `Refused`, `WorkerDied`."""
        self._open = ""
        seconds = self._send({"do": "open", "func": func_json}, timeout)["seconds"]
        self._open = func_json
        return seconds

    def trial(
        self, trace: Any, *, seeds: list[int], rounds: int, timeout: float
    ) -> Mapping[str, float]:
        """Check and time one candidate of the open kernel. `Refused`, `WorkerDied`."""
        if self._process is None and self._open:
            self.open(self._open, timeout)
        request = {"do": "trial", "trace": trace, "seeds": seeds, "rounds": rounds}
        return self._send(request, timeout)

    def close(self) -> None:
        """Stop the worker, if one runs."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TVM_NUM_THREADS": str(self._target.threads or usable_cores()),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "codegen.tune_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def _send(self, request: dict[str, Any], timeout: float) -> dict[str, float]:
        if self._process is None:
            self._process = self._start()
            timeout += START_SECONDS
        if request["do"] == "open":
            request = {**request, "target": self._target.to_json()}
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            answer = json.loads(self._line(self._process, timeout))
        except (OSError, ValueError) as error:
            code = self._process.poll()
            self.close()
            raise WorkerDied(f"the worker process ended (status {code}): {error}") from error
        except BaseException:
            # A late answer must never be taken for the next one's (Ctrl-C, a timeout).
            self.close()
            raise
        if "error" in answer:
            raise Refused(str(answer["error"]))
        found: dict[str, float] = answer["ok"]
        return found

    def _line(self, process: subprocess.Popen[bytes], timeout: float) -> bytes:
        assert process.stdout is not None
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([process.stdout], [], [], timeout)
            if not ready:
                raise WorkerDied(f"no answer in {timeout:.0f} s")
            got = os.read(process.stdout.fileno(), 1 << 16)
            if not got:
                process.wait(timeout=5)
                raise OSError("its output ended")
            self._buffer += got
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line
