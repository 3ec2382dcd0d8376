"""The doors: rewrite, compile, load, tune. Everything is imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_DOORS = {
    "rewrite": "rewriter.api",
    "compile": "rewriter.api",
    "load": "rewriter.api",
    "fine_tune": "rewriter.api",
    "tune": "rewriter.api",
    "Result": "rewriter.api",
    "Plan": "passes.plan",
    "RewriteReport": "rewriter.report",
    "Artifact": "codegen.runtime",
    "Target": "codegen.target",
    "TuningSession": "rewriter.session",
}

__all__ = ["__version__", *_DOORS]


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'rewriter' has no attribute {name!r}")
    return getattr(importlib.import_module(_DOORS[name]), name)
