"""How tvm is imported and configured: environment first, then a check of the pinned versions.

Import this module before anything of tvm. TVM reads its thread settings once, when its pool is
first used, so they must be in the environment before that.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
import json
import os
from collections.abc import Iterator
from typing import Any

from codegen.target import Target, usable_cores
from passes.errors import LoweringError

os.environ.setdefault("TVM_NUM_THREADS", str(usable_cores()))
# Workers pinned to a core wait whole scheduler ticks when another process takes that core.
os.environ.setdefault("TVM_BIND_THREADS", "0")

_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def check_versions() -> None:
    """`LoweringError` for versions known to crash.

    apache-tvm-ffi 0.1.15 dies with a segmentation fault when IR holding a PrimFunc is serialised,
    and pip picks it when it is not held back.
    """
    found = importlib.metadata.version("apache-tvm-ffi")
    if tuple(int(p) for p in found.split(".")[:3]) >= (0, 1, 15):
        raise LoweringError(
            f"apache-tvm-ffi {found} crashes when IR is saved; "
            "install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'"
        )


def tvm_target(target: Target) -> Any:
    """The tvm.target.Target of `target`."""
    return _tvm_target(json.dumps(dict(target.tvm), sort_keys=True))


@functools.cache
def _tvm_target(text: str) -> Any:
    import tvm

    check_versions()
    return tvm.target.Target(json.loads(text))


@contextlib.contextmanager
def lowering_for(target: Target) -> Iterator[None]:
    """Within the block `current_target()` is `target`, and TVM's own current target too."""
    token = _TARGET.set(target)
    try:
        with tvm_target(target):
            yield
    finally:
        _TARGET.reset(token)


def current_target() -> Target:
    """The target being lowered for; TE definitions take vector widths from it."""
    target = _TARGET.get()
    if target is None:
        raise LoweringError("no target is set: call this inside lowering_for(target)")
    return target
