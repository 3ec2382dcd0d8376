"""The benchmark of fitting: rows have names of their own, and stored ones are not made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import fitting


def test_rows_have_names_of_their_own() -> None:
    names = [row.name for row in fitting.ROWS]
    assert len(set(names)) == len(names)
    assert {"hedgehog fitted", "lolcats:window=16 fitted"} <= set(names)


def test_what_is_stored_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, made = tmp_path / "record.json", []
    record.write_text(json.dumps({r.name: {} for r in fitting.ROWS if r.name != "topk"}))

    def measure(*given: object) -> dict[str, object]:
        made.append(given[1])
        return {"name": "topk", "cosine_mean": 0.5, "nn_agreement": 0.25}

    monkeypatch.setattr(fitting, "prepare", lambda *_: object())
    monkeypatch.setattr(fitting, "measure", measure)
    for _ in range(2):
        assert fitting.main(["--record", str(record)]) == 0
    assert made == [fitting.Row("topk")]
    assert json.loads(record.read_text())["topk"]["cosine_mean"] == 0.5
    assert list(tmp_path.iterdir()) == [record]
