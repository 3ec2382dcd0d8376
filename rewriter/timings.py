"""BenchResult and EngineTiming: medians and spreads of engines timed in the same session."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = 1


@dataclass(frozen=True)
class EngineTiming:
    """One engine: `status` is "ok", "skipped" (not here) or "failed", with `why`.

    Milliseconds of single calls: median, first and third quartile, smallest. `ratio` is the
    median by ours (above 1: ours is faster). `max_abs_error` is against eager PyTorch on the
    same inputs. `prepare_s` is loading, exporting and compiling with the first call. `resident_mb`
    is how much the engine's process grew by loading, compiling and running the model.
    """

    engine: str
    label: str
    status: str
    why: str = ""
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    min_ms: float | None = None
    ratio: float | None = None
    max_abs_error: float | None = None
    runs: int = 0
    prepare_s: float | None = None
    resident_mb: float | None = None

    @property
    def iqr_ms(self) -> float | None:
        """Spread: the width of the middle half of the runs."""
        if self.q1_ms is None or self.q3_ms is None:
            return None
        return self.q3_ms - self.q1_ms

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "iqr_ms": self.iqr_ms}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineTiming:
        """Inverse of `to_json`."""
        return cls(**{k: data[k] for k in cls.__dataclass_fields__ if k in data})


@dataclass(frozen=True)
class BenchResult:
    """All engines of one bench: what ran, on what, and how sure the numbers are.

    `load` is how many cores other processes used just before timing; `notes` say what makes the
    numbers doubtful or the comparison unequal.
    """

    subject: str
    threads: int
    engines: tuple[EngineTiming, ...]
    rounds: int = 0
    warmup: int = 0
    load: float | None = None
    machine: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def engine(self, name: str) -> EngineTiming | None:
        """One engine's row, if it is there."""
        return next((e for e in self.engines if e.engine == name), None)

    @property
    def faster(self) -> bool | None:
        """Whether ours beat eager PyTorch; None unless both were timed."""
        ours, eager = self.engine("ours"), self.engine("eager")
        if ours is None or eager is None or ours.median_ms is None or eager.median_ms is None:
            return None
        return ours.median_ms < eager.median_ms

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(self),
            "schema": SCHEMA,
            "notes": list(self.notes),
            "engines": [e.to_json() for e in self.engines],
            "faster": self.faster,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BenchResult:
        """Inverse of `to_json`."""
        fields = {k: data[k] for k in cls.__dataclass_fields__ if k in data}
        fields["engines"] = tuple(EngineTiming.from_json(e) for e in data["engines"])
        fields["notes"] = tuple(data.get("notes", ()))
        return cls(**fields)

    def table(self) -> RenderableType:
        """For a terminal (rich)."""
        from rewriter.terminal import bench_view

        return bench_view(self)


def statistics(ms: Sequence[float]) -> dict[str, Any]:
    """median_ms, q1_ms, q3_ms, min_ms and runs of single times; {} for none."""
    if not ms:
        return {}
    q1, median, q3 = (float(x) for x in np.percentile(np.asarray(ms), (25, 50, 75)))
    return {"median_ms": median, "q1_ms": q1, "q3_ms": q3, "min_ms": min(ms), "runs": len(ms)}


def max_abs_error(got: Sequence[Any], want: Sequence[Any]) -> float | None:
    """Largest difference over all outputs in order; None if their numbers or shapes differ."""
    if len(got) != len(want) or not want:
        return None
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            return None
        diff = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
        top = float(diff.max(initial=0.0))
        worst = math.nan if math.isnan(top) else max(worst, top)
        if math.isnan(worst):
            return worst
    return worst


def machine() -> dict[str, Any]:
    """The processor's name, its cores, and how many this process may use."""
    from codegen.target import usable_cores

    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "usable_cores": usable_cores()}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
