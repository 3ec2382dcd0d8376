"""Where an artifact's time goes, kernel by kernel. Needs neither torch nor the compiler.

TVM's virtual machine calls an instrument before and after every call; the time between the two
is the kernel's. Calls of the machine itself (allocation, shape checks) are put together.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from codegen import workers
from codegen.input_check import check_inputs
from codegen.runtime import Artifact
from passes.errors import UsageError

FLOPS = ("add", "sub", "mul", "div")
MACHINE = "virtual machine"


@dataclass(frozen=True)
class KernelTime:
    """One kernel in one run of the model: `ms` over its `calls` (median over runs).

    `share` of the time of all kernels. `gflops` (float additions, multiplications, divisions)
    and `gbytes` (each operand read or written once as a whole: too high where a kernel only
    reads parts, as a gather does) per second, None where not counted.
    """

    name: str
    rule: str
    calls: int
    ms: float
    share: float
    gflops: float | None = None
    gbytes: float | None = None


@dataclass(frozen=True)
class Profile:
    """Kernels by time. `instrumented_ms` is a run with the instrument, `plain_ms` one without."""

    kernels: tuple[KernelTime, ...]
    plain_ms: float
    instrumented_ms: float
    runs: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "kernels": [asdict(k) for k in self.kernels]}


def profile(artifact: Artifact, inputs: Mapping[str, Any], seconds: float = 2.0) -> Profile:
    """Run `artifact` on `inputs` (name -> array) for about `seconds` in all, and time its kernels.

    Raises:
        InputError: inputs that do not fit. UsageError: the artifact is for a GPU, where a call
        ends before its kernel does.
    """
    if str(artifact.manifest.target.get("kind")) == "gpu":
        raise UsageError("profile: only artifacts for processors can be profiled")
    if not seconds > 0:
        raise UsageError(f"seconds: {seconds} given, more than 0 expected")
    arrays = check_inputs(artifact.inputs, (), dict(inputs))
    pool = workers.pool_of(artifact.threads)
    return pool.call(lambda _: _profiled(artifact, arrays, seconds))  # type: ignore[no-any-return]


def _profiled(artifact: Artifact, arrays: list[Any], seconds: float) -> Profile:
    plain = _times(artifact, arrays, seconds / 3, None)
    clock = _Clock()
    timed = _times(artifact, arrays, 2 * seconds / 3, clock)
    rows = _rows(clock.runs[1:], {k["name"]: k for k in artifact.report.get("kernels", ())})
    return Profile(rows, _median(plain), _median(timed), len(timed), artifact.threads)


def _times(artifact: Artifact, arrays: list[Any], seconds: float, clock: _Clock | None) -> Any:
    """Milliseconds of single runs on a machine of its own (the first is not counted)."""
    machine = artifact.new_machine()
    if clock is not None:
        machine["set_instrument"](clock)
    call = artifact.bound(machine, arrays)
    times: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        if clock is not None:
            clock.next_run()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


class _Clock:
    """The instrument: seconds and calls by name, one dict a run. Calls may nest."""

    def __init__(self) -> None:
        self.runs: list[dict[str, tuple[float, int]]] = [{}]
        self._open: list[list[float]] = []

    def next_run(self) -> None:
        self.runs.append({})

    def __call__(self, _func: Any, name: str, before: bool, _result: Any, *_args: Any) -> int:
        now = time.perf_counter()
        if before:
            self._open.append([time.perf_counter(), 0.0])
            return 0
        start, inside = self._open.pop()
        spent = now - start
        if self._open:
            self._open[-1][1] += spent
        seconds, calls = self.runs[-1].get(str(name), (0.0, 0))
        self.runs[-1][str(name)] = (seconds + spent - inside, calls + 1)
        return 0


def _rows(runs: list[dict[str, tuple[float, int]]], known: Mapping[str, Any]) -> Any:
    seconds: dict[str, list[float]] = defaultdict(list)
    calls: dict[str, int] = defaultdict(int)
    for run in runs:
        once: dict[str, float] = defaultdict(float)
        counted: dict[str, int] = defaultdict(int)
        for name, (spent, times) in run.items():
            row = name if name in known else MACHINE
            once[row] += spent
            counted[row] += times
        for name, spent in once.items():
            seconds[name].append(spent)
            calls[name] = counted[name]
    medians = {name: _median(values) for name, values in seconds.items()}
    total = sum(medians.values()) or 1.0
    rows = [_row(n, s, calls[n], total, known.get(n, {})) for n, s in medians.items()]
    return tuple(sorted(rows, key=lambda row: -row.ms))


def _row(name: str, spent: float, calls: int, total: float, known: Mapping[str, Any]) -> KernelTime:
    ops, gflops, gbytes = known.get("ops"), None, None
    if ops and spent > 0:
        gflops = calls * flops_of(ops) / spent / 1e9
        gbytes = calls * (ops["bytes_read"] + ops["bytes_written"]) / spent / 1e9
    rule = str(known.get("scheduled_by") or ("" if name == MACHINE else "nothing"))
    return KernelTime(name, rule, calls, spent * 1e3, spent / total, gflops, gbytes)


def flops_of(ops: Mapping[str, Any]) -> int:
    """Floating additions, multiplications and divisions in an OpCount's plain data."""
    counted = 0
    for key, number in ops["ops"].items():
        op, _, dtype = key.partition(":")
        counted += int(number) if op in FLOPS and "float" in dtype else 0
    return counted


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
