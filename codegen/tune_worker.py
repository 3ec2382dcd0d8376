"""The process that builds, checks and times candidates; a crash in here costs one candidate.

`python -m codegen.tune_worker` reads one JSON request a line from stdin and answers with one line
on the stdout it was started with: {"ok": {...}} or {"error": "..."}. Requests:

    {"do": "open", "func": TVM JSON, "target": {...}}       -> {"seconds"} of the default
    {"do": "trial", "trace": ..., "seeds": n, "rounds": n}  -> {"seconds", "default_seconds",
                                                               "ratio", "max_abs_error"}
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import statistics
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from codegen.target import Target

Array = NDArray[Any]
# One timed block lasts about this long: enough to hide the clock, short enough to take turns.
BLOCK_SECONDS = 0.004
# After this many rounds a candidate this much slower is not worth more.
_EARLY, _HOPELESS = 3, 1.3
# Values within a relative and, against the largest magnitude, an absolute distance agree.
_TOLERANCE = {"float64": (1e-10, 1e-11), "float32": (1e-4, 2e-5), "float16": (1e-2, 2e-3)}


class Mismatch(Exception):
    """A candidate's outputs differ from the default's."""


class Kernel:
    """One kernel under its default schedule, against which candidates are held."""

    def __init__(self, func_json: str, target: Target) -> None:
        import tvm

        from codegen import tvm_env
        from codegen.schedule import schedule
        from codegen.tune_space import outputs_of

        self._tvm = tvm
        self.func = tvm.ir.load_json(func_json)
        self._target = tvm_env.tvm_target(target)
        with tvm_env.lowering_for(target):
            outcome = schedule(self.func, target)
        if not outcome.rule:
            raise ValueError("no rule schedules this kernel by default")
        self.specs = [_spec(p) for p in self.func.params]
        self.outputs = outputs_of(self.func)
        self._high = min([8, *(n for shape, _ in self.specs for n in shape if n > 1)])
        self.default = self._build(outcome.func)
        self._settle_indices()
        self._arrays = self._tensors(0)
        self._wanted = self._run(self.default, 0)
        self._block(self.default, 1)  # the first call pays for loading
        self._calls = self._calls_for(self._block(self.default, 1))

    def _settle_indices(self) -> None:
        """Integers become 0 where larger ones make even the default read beyond a tensor."""
        if not any(np.dtype(dtype).kind == "i" for _, dtype in self.specs):
            return
        first, again = (self._run(self.default, 1) for _ in range(2))
        if not all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
                   for a, b in zip(first, again, strict=True)):  # fmt: skip
            self._high = 1

    def _build(self, func: Any) -> Any:
        made = func.with_attr("global_symbol", "main").with_attr("tirx.noalias", True)
        return self._tvm.compile(self._tvm.IRModule({"main": made}), target=self._target).jit()

    def _tensors(self, seed: int) -> list[Any]:
        rng = np.random.default_rng(seed)
        made = []
        for at, (shape, dtype) in enumerate(self.specs):
            array = (
                poison(shape, dtype, seed)
                if at in self.outputs
                else _random(rng, shape, dtype, self._high)
            )
            made.append(self._tvm.runtime.tensor(array))
        return made

    def _run(self, library: Any, seed: int) -> list[Array]:
        """The outputs on the inputs of `seed`; those of seed 0 are kept and used again."""
        tensors = self._arrays if seed == 0 else self._tensors(seed)
        for at in self.outputs:
            tensors[at].copyfrom(poison(*self.specs[at], seed))
        library["main"](*tensors)
        return [tensors[at].numpy() for at in self.outputs]

    def _block(self, library: Any, calls: int) -> float:
        evaluator = library.time_evaluator("main", self._tvm.cpu(), number=calls, repeat=1)
        return float(evaluator(*self._arrays).results[0])

    def seconds(self, rounds: int) -> float:
        """Median time of the default."""
        return statistics.median(self._block(self.default, self._calls) for _ in range(rounds))

    def trial(self, trace: Any, seeds: list[int], rounds: int) -> dict[str, float]:
        """Build, check on every seed and time one candidate in turns with the default."""
        from codegen.tune_space import replay

        library = self._build(replay(self.func, trace).mod["main"])
        error = max(self._check(library, seed) for seed in seeds)
        calls = min(self._calls, self._calls_for(self._block(library, 1)))
        mine: list[float] = []
        others: list[float] = []
        for turn in range(rounds):
            pair = (library, self.default) if turn % 2 else (self.default, library)
            for lib in pair:
                if lib is library:
                    mine.append(self._block(library, calls))
                else:
                    others.append(self._block(self.default, self._calls))
            if turn + 1 >= _EARLY and _ratio(mine, others) > _HOPELESS:
                break
        return {
            "seconds": statistics.median(mine),
            "default_seconds": statistics.median(others),
            "ratio": _ratio(mine, others),
            "max_abs_error": error,
        }

    def _calls_for(self, seconds: float) -> int:
        return max(1, int(BLOCK_SECONDS / max(seconds, 1e-9)))

    def _check(self, library: Any, seed: int) -> float:
        wanted = self._wanted if seed == 0 else self._run(self.default, seed)
        made = self._run(library, seed)
        return max(difference(a, b) for a, b in zip(made, wanted, strict=True))


def _ratio(mine: list[float], others: list[float]) -> float:
    """Time over the default's: in the typical turn, or of the calm ones, whichever is worse.

    Other load on the machine hits both at random; only the calm turns compare the code alone.
    """
    typical = statistics.median(a / b for a, b in zip(mine, others, strict=True))
    return max(typical, _calm(mine) / _calm(others))


def _calm(times: list[float]) -> float:
    return sorted(times)[len(times) // 4]


def difference(made: Array, wanted: Array) -> float:
    """Largest absolute difference; `Mismatch` where it is more than rounding explains.

    Not-a-number and infinities must be where they are in `wanted`.
    """
    if made.dtype.kind not in "f":
        if not np.array_equal(made, wanted):
            raise Mismatch(f"{int((made != wanted).sum())} of {made.size} values differ")
        return 0.0
    relative, absolute = _TOLERANCE[made.dtype.name]
    a, b = made.astype("float64"), wanted.astype("float64")
    finite = np.isfinite(b)
    if not np.array_equal(np.where(finite, 0.0, a), np.where(finite, 0.0, b), equal_nan=True):
        raise Mismatch("values that are not finite are in other places")
    if not np.isfinite(a[finite]).all():
        raise Mismatch("outputs were left unwritten or are not finite")
    if not finite.any():
        return 0.0
    gap, size = np.abs(a[finite] - b[finite]), np.abs(b[finite])
    if (gap > relative * size + absolute * size.max()).any():
        raise Mismatch(f"outputs differ by {gap.max():.3g} (largest value {size.max():.3g})")
    return float(gap.max())


def _spec(param: Any) -> tuple[tuple[int, ...], str]:
    return tuple(int(n) for n in param.ty.shape), str(param.ty.dtype)


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, high: int) -> Array:
    """Values for an input; signed integers are small because they may be indices."""
    kind = np.dtype(dtype).kind
    if kind == "f":
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    if kind == "b":
        return np.asarray(rng.random(shape) < 0.7)
    if kind == "u":
        return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    return rng.integers(0, high, shape).astype(dtype)


def poison(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """What an output holds before: nothing a kernel would leave there by chance."""
    kind = np.dtype(dtype).kind
    if kind == "f":
        return np.full(shape, np.nan if seed % 2 == 0 else 1.5e4, dtype)
    if kind == "b":
        return np.full(shape, seed % 2 == 0)
    return np.full(shape, 85 + seed % 2, dtype)


class Server:
    """Answers requests; keeps the kernel that was opened last."""

    def __init__(self) -> None:
        self._kernel: Kernel | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request; every failure becomes an answer."""
        try:
            return {"ok": self._do(request)}
        # Whatever a candidate raises (TVM's many types, memory, a Mismatch) is its result.
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            wanted = [line for line in lines if "Error message" in line] or lines[-1:]
            return {"error": f"{type(error).__name__}: {wanted[0] if wanted else ''}"[:300]}

    def _do(self, request: Mapping[str, Any]) -> dict[str, float]:
        if request["do"] == "open":
            self._kernel = None
            self._kernel = Kernel(request["func"], Target(**request["target"]))
            return {"seconds": self._kernel.seconds(5)}
        if self._kernel is None:
            raise ValueError("no kernel is open")
        return self._kernel.trial(request["trace"], request["seeds"], request["rounds"])


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _private_stdout() -> TextIO:
    """The stdout this process was started with; whatever else prints goes to stderr."""
    private = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return private


def main() -> None:
    """Serve until stdin ends."""
    _die_with_parent()
    answers, server = _private_stdout(), Server()
    for line in sys.stdin:
        answers.write(json.dumps(server.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
