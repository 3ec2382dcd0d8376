"""Rule: how one kind of kernel is scheduled. One file per rule in codegen/schedules/.

A rule knows its kernels by the names of their blocks (given by the TE definitions in
codegen/kernels/), because block names survive fusion and function attributes do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from codegen.target import Target


@dataclass(frozen=True)
class Rule:
    """`apply(func, target)` returns a finished tvm.s_tir.Schedule, or None if not its kernel.

    `kinds` are the target kinds ("cpu", "gpu", "edge") it serves; `order` sorts rules, specific
    ones (low) before general ones (high).
    """

    name: str
    apply: Callable[[Any, Target], Any | None]
    kinds: tuple[str, ...] = ("cpu",)
    order: int = 50
