"""Target: what code is made for. One file per target in codegen/targets/, found by discovery.

Nothing here imports tvm: a process that only runs an artifact reads targets too.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from codegen.cores import usable_cores as usable_cores
from passes.errors import UnknownName, UsageError


@dataclass(frozen=True)
class Target:
    """One target. `tvm` is the dict given to tvm.target.Target.

    `features` are the processor features the code needs, in the words of /proc/cpuinfo (x86) or
    of the architecture; a machine that lacks one refuses the artifact. `vector_bytes` is the
    width of a vector register, `l1_bytes` and `l2_bytes` the caches per core, `threads` the
    default number of threads (0: as many as the running process may use), `energy` the name of
    the energy table.
    """

    name: str
    kind: str  # "cpu", "gpu" or "edge"
    triple: str
    tvm: Mapping[str, Any]
    features: tuple[str, ...] = ()
    vector_bytes: int = 64
    vector_registers: int = 32
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 1024 * 1024
    threads: int = 0
    energy: str = "horowitz-45nm"
    description: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lanes(self) -> int:
        """float32 values in one vector register."""
        return self.vector_bytes // 4

    def to_json(self) -> dict[str, Any]:
        """Plain data, as kept in an artifact's manifest."""
        return {**asdict(self), "tvm": dict(self.tvm), "options": dict(self.options)}


def checked_threads(asked: object) -> int:
    """`asked` if it is a number of threads, else `UsageError`."""
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise UsageError(f"threads: {asked!r} given, a whole number from 1 expected")
    return asked


def targets() -> dict[str, Target]:
    """All targets by name: every module of codegen/targets/ has a function `target() -> Target`."""
    package = importlib.import_module("codegen.targets")
    found: dict[str, Target] = {}
    for info in pkgutil.iter_modules(package.__path__):
        made: Target = importlib.import_module(f"codegen.targets.{info.name}").target()
        found[made.name] = made
    return dict(sorted(found.items()))


def target_named(name: str) -> Target:
    """The target called `name`; `UnknownName` with near names if there is none."""
    known = targets()
    if name not in known:
        raise UnknownName("target", name, known)
    return known[name]
