"""Which rule schedules which kernel, and the refusal of what nobody takes."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import tirx

from codegen.rule import Rule
from codegen.target import Target
from passes.errors import LoweringError

# Attribute a TE caller puts on a PrimFunc to name the rule meant for it.
RULE_ATTR = "rewriter.rule"
Tuned = Callable[[Any, Target], Any | None]


@dataclass(frozen=True)
class Outcome:
    """A scheduled PrimFunc (`func` is as it was when `rule` is ""), and rules that crashed."""

    func: Any
    rule: str
    crashes: tuple[str, ...] = ()


@functools.cache
def rules() -> tuple[Rule, ...]:
    """All rules of codegen/schedules/, specific ones first; modules named _x hold no rule."""
    package = importlib.import_module("codegen.schedules")
    found: list[Rule] = []
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("_"):
            found.append(importlib.import_module(f"codegen.schedules.{info.name}").RULE)
    return tuple(sorted(found, key=lambda r: (r.order, r.name)))


def workload_key(func: Any) -> str:
    """A stable name of a kernel's computation, the same in every process."""
    plain = tirx.PrimFunc(func.params, func.body, func.ret_type)
    return f"{tvm_ffi.structural_hash(plain, map_free_vars=True) & (2**64 - 1):016x}"


def schedule(func: Any, target: Target, tuned: Tuned | None = None) -> Outcome:
    """Schedule one PrimFunc: a tuned record, then the rule it names, then the rules in order.

    A rule that raises is recorded in `crashes` and the next one is asked. The caller decides
    what to do with a function no rule took (`rule` is "").
    """
    crashes: list[str] = []
    plain = func.without_attr(RULE_ATTR) if RULE_ATTR in (func.attrs or {}) else func
    named = str(func.attrs[RULE_ATTR]) if RULE_ATTR in (func.attrs or {}) else ""
    if tuned is not None:
        done = _try("tuned", tuned, plain, target, crashes)
        if done is not None:
            return Outcome(done, "tuned")
    mine = [r for r in rules() if target.kind in r.kinds]
    for rule in sorted(mine, key=lambda r: r.name != named):
        done = _try(rule.name, rule.apply, plain, target, crashes)
        if done is not None:
            return Outcome(done, rule.name, tuple(crashes))
    return Outcome(func, "", tuple(crashes))


def _try(
    name: str, apply: Callable[[Any, Target], Any], func: Any, target: Target, crashes: list[str]
) -> Any | None:
    try:
        sch = apply(func, target)
    # A rule meets functions nobody foresaw; TVM raises many types (ScheduleError, ValueError, ...).
    except Exception as error:
        crashes.append(f"{name}: {_last_line(error)}")
        return None
    if sch is None:
        return None
    done = sch.mod["main"] if hasattr(sch, "mod") else sch
    done = done.with_attr("tirx.is_scheduled", True)
    for key in ("global_symbol", "op_pattern"):
        if key in (func.attrs or {}):
            done = done.with_attr(key, func.attrs[key])
    return done


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = [line for line in lines if "Error message" in line] or lines[-1:]
    return f"{type(error).__name__}: {wanted[0] if wanted else ''}"[:300]


def refuse(unscheduled: dict[str, Outcome]) -> None:
    """`LoweringError` that names every kernel no rule took; does nothing for an empty dict."""
    if not unscheduled:
        return
    lines = []
    for name, outcome in sorted(unscheduled.items()):
        told = "; ".join(outcome.crashes)
        lines.append(f"  {name}" + (f" (rules that failed: {told})" if told else ""))
    raise LoweringError(
        "no schedule rule takes these kernels, and unscheduled code is slow; add a rule in "
        "codegen/schedules or allow it (allow_unscheduled=True):\n" + "\n".join(lines)
    )
