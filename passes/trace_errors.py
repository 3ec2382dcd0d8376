"""A tracing failure in a few lines: what failed, where in the user's code, what torch suggests."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

_FIXES = re.compile(r"Suggested fixes:\n((?:[ \t]+\S.*\n?|.*=.*\n?)+)")
_ASK = re.compile(r"^(consider using .*)$", re.MULTILINE | re.IGNORECASE)
_CALL = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.+)')
_NOISE = (
    "For more information",
    "For extended logs",
    "For more debugging help",
    "For C++ stack trace",
    "If you suspect",
    "The error above occurred",
    "The following call raised",
    "Caused by:",
    "File ",
    "Traceback",
    "consider using",
    "- Not all values",
)
_OPTIONS = {
    "data-dependent": (
        "the model branches on (or slices by) the value of a tensor, which no trace can record; "
        "use torch.where or torch.cond, or take the branch out of forward"
    ),
    "control flow": (
        "the model branches on the value of a tensor, which no trace can record; use torch.where "
        "or torch.cond, or take the branch out of forward"
    ),
}


def reason(error: BaseException) -> str:
    """The first line of `error` that says something, without torch's advice on logging."""
    for line in str(error).splitlines():
        text = line.strip()
        if text and not text.startswith(_NOISE):
            return text.replace(' For more information, run with TORCH_LOGS="+dynamic".', "")
    return type(error).__name__


def explain(model: Any, error: BaseException, second: BaseException | None = None) -> str:
    """A message of a few lines for a failed trace of `model`.

    `error` is torch.export's, `second` symbolic_trace's.
    """
    text = str(error)
    lines = [f"{type(model).__name__}: {reason(error)}"]
    if where := _where(model, error):
        lines.append(f"  at {where}")
    lines += [f"  {advice}" for key, advice in _OPTIONS.items() if key in text][:1]
    if asked := _ASK.search(text):
        lines.append(f"  torch suggests: {asked.group(1)}")
    if fixes := _FIXES.search(text):
        lines.append("  torch suggests: " + "; ".join(fixes.group(1).split("\n")).strip("; "))
    if second is not None:
        lines.append(f"  symbolic_trace failed too: {reason(second)}")
    return "\n".join(lines)


def _where(model: Any, error: BaseException) -> str:
    """file:line and the code of the model's own line, as torch names it or from the traceback."""
    calls = [(f, int(n), code) for f, n, _, code in _CALL.findall(str(error))]
    frames = traceback.extract_tb(error.__traceback__)
    calls += [(f.filename, f.lineno or 0, f.line or "") for f in reversed(frames)]
    own = _own_files(model)
    best = [c for c in calls if c[0] in own] or [c for c in calls if not _is_library(c[0])]
    if not best:
        return ""
    name, line, code = best[0]
    return f"{name}:{line}: {code.strip()}" if code else f"{name}:{line}"


def _own_files(model: Any) -> set[str]:
    """Files in which the classes of the model's modules are written, torch's left out."""
    files: set[str] = set()
    for module in model.modules() if isinstance(model, torch.nn.Module) else ():
        source = getattr(sys.modules.get(type(module).__module__), "__file__", None)
        with_code = source or _file_of(type(module))
        if with_code and not with_code.startswith(_TORCH):
            files.add(with_code)
    return files


def _file_of(cls: type) -> str | None:
    try:
        return inspect.getsourcefile(cls)
    except (TypeError, OSError):
        return None


_TORCH = str(Path(torch.__file__).parent)
_PASSES = str(Path(__file__).parent)


def _is_library(name: str) -> bool:
    return name.startswith((_TORCH, _PASSES, "<")) or "/lib/python" in name
