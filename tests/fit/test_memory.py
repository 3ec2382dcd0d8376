"""Pages kept between the steps of a fit."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest

from rewriter import fit_memory
from rewriter.fit_memory import kept_pages

SIZE = 16 << 20


def faults(work: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def blocks() -> None:
    for _ in range(8):
        bytearray(SIZE)[-1]


@pytest.mark.skipif(fit_memory._glibc() is None, reason="not glibc")
def test_freed_pages_do_not_fault_in_again() -> None:
    pages = SIZE // resource.getpagesize()
    with kept_pages():
        blocks()
        assert faults(blocks) < pages  # one of eight blocks would be as many


def test_nothing_is_done_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_memory, "_glibc", lambda: None)
    with kept_pages():
        blocks()
