"""Copies of graphs and of modules that hold them, without the warnings torch gives itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Copied = TypeVar("Copied")
_ABOUT_ITSELF = r"`isinstance\(treespec, LeafSpec\)` is deprecated"


@contextmanager
def without_torchs_own_warnings() -> Iterator[None]:
    """torch 2.13 copies its tree specs in a way that it warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _ABOUT_ITSELF, FutureWarning)
        yield


def deep_copy(value: Copied, memo: dict[int, Any] | None = None) -> Copied:
    """copy.deepcopy."""
    with without_torchs_own_warnings():
        return copy.deepcopy(value, memo)
