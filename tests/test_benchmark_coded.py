"""benchmarks.coded on tiny shapes: verified rows, JSON and page; a wrong kernel stops the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import coded, peaks


@pytest.mark.slow
def test_rows_json_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "PRODUCTS", ((3, 40, 33),))
    monkeypatch.setattr(coded, "SUMS", ((1, 2, 20, 8, 16),))
    monkeypatch.setattr(peaks, "measure", lambda threads: peaks.Peaks(100.0, 10.0, threads))
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    told = ["--threads", "1", "--seconds", "0.01", "--json", str(tmp_path / "new" / "k.json")]
    assert coded.main([*told, "--page", str(tmp_path / "k.md")]) == 0
    data = json.loads((tmp_path / "new" / "k.json").read_text())
    names = [r["kernel"] for r in data["rows"]]
    assert names[: len(coded.LINEAR)] == list(coded.LINEAR)
    assert names.count("PyTorch fp32") == names.count("our dense fp32") == 2
    assert "signed sums" in names
    assert all(r["median_ms"] >= r["best_ms"] > 0 for r in data["rows"])
    text = (tmp_path / "k.md").read_text()
    assert text.count("\n| ") == len(names) + 1
    assert "signed sums" in text


def test_a_wrong_kernel_stops_the_run() -> None:
    import torch

    wrong = coded._Contender("ours", lambda: torch.ones(2, 2), np.zeros((2, 2)) + 2.0, 1, 1)
    with pytest.raises(ValueError, match="ours at 2 x 2 is wrong"):
        coded._timed("2 x 2", [wrong], 0.01)
