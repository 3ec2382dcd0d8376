"""The benchmark of generating: turns, rounds that go on, page and plot; without a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import decode
from benchmarks.decode_page import kept, write_page


def round_of(pace: float) -> dict[str, dict[str, list[float]]]:
    """Exact attention takes longer with every mark, elu does not."""
    return {
        "elu": {str(m): [pace, pace + 1] for m in decode.MARKS},
        "exact": {str(m): [pace * (1 + m / 4096)] for m in decode.MARKS},
    }


def outcome() -> dict[str, Any]:
    return decode.result("x", "m", 1, decode.MARKS, [round_of(2.0), round_of(4.0)])


def test_best_and_median_are_of_all_rounds() -> None:
    told = outcome()
    assert told["best_ms"]["elu"] == [2.0] * len(decode.MARKS)
    assert told["median_ms"]["elu"] == [3.5] * len(decode.MARKS)
    assert kept(told)["elu"].startswith("100%")
    assert kept(told)["exact"].startswith("34%")


def test_the_page_and_its_picture(tmp_path: Path) -> None:
    write_page(outcome(), tmp_path)
    text = (tmp_path / "decoding.md").read_text()
    assert "| elu | 500 (286) |" in text
    assert "images/decode-m.svg" in text
    assert "<svg" in (tmp_path / "images" / "decode-m.svg").read_text()


class Counter:
    """Counts up: token n is followed by n + 1."""

    facts = SimpleNamespace(batch=1)

    def generate(self, tokens: Any, number: int) -> Any:
        return tokens[:, -1:] + 1 + np.arange(number)[None]


def test_a_walk_goes_on_where_it_was() -> None:
    walk = decode.Walk(Counter())  # type: ignore[arg-type]
    assert walk.forward(0) == 0.0
    assert walk.forward(5) > 0
    walk.forward(3)
    assert (walk.made, walk.last.tolist()) == (8, [[9]])


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def one_round(paths: Any, marks: Any, threads: int) -> Any:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(threads)
        return round_of(2.0)

    monkeypatch.setattr(decode, "one_round", one_round)
    monkeypatch.setattr(decode, "compiled", lambda model, form, tokens, folder: folder / form)
    command = ["--rounds", "3", "--threads", "1", "--results", str(tmp_path)]
    command += ["--docs", str(tmp_path / "docs")]
    (tmp_path / "docs").mkdir()
    with pytest.raises(KeyboardInterrupt):
        decode.main(command)
    (stored,) = tmp_path.rglob("llama-tiny-1threads.json")
    assert len(json.loads(stored.read_text())["rounds"]) == 2
    ran.pop()
    assert decode.main(command) == 0
    assert len(json.loads(stored.read_text())["rounds"]) == 3
    assert decode.main(command) == 0  # nothing left to run: the page alone
    assert len(ran) == 2
