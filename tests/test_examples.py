"""Every example runs."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

EXAMPLES = sorted(p.stem for p in (Path(__file__).parent.parent / "examples").glob("[0-9]*.py"))


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(f"examples.{name}").main()
    assert capsys.readouterr().out.strip()
