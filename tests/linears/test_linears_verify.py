"""`rewriter verify` on artifacts with rewritten linear layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rewriter.cli import run

TINY = "tests.cli_factories:encoder"


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert run(list(argv)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_calibrated_on_the_example_inputs_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "m.rwa")
    call(capsys, "compile", TINY, "--linear", "shiftadd_ptq,*linear1", "-o", path)
    outcome = json.loads(call(capsys, "verify", path, TINY, "--json"))
    assert outcome["rewritten"]["ok"]


@pytest.mark.slow  # fits, compiles and verifies twice
@pytest.mark.parametrize("linear", ["shiftadd_ptq,*linear1", "moe:latencies=1/1,*linear1"])
def test_what_was_calibrated_or_trained_on_data_needs_its_folder(
    linear: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder, path = tmp_path / "d.npz", tmp_path / "fitted", str(tmp_path / "m.rwa")
    np.savez(data, src=np.random.default_rng(0).standard_normal((32, 24, 32), np.float32))
    call(
        capsys, "fit", TINY, "--linear", linear, "--seconds", "1", "--data", str(data),
        "-o", str(folder),
    )  # fmt: skip
    call(capsys, "compile", TINY, "--from", str(folder), "-o", path)
    told = call(capsys, "verify", path, TINY)
    assert "needs --from FOLDER" in told
    outcome = json.loads(call(capsys, "verify", path, TINY, "--from", str(folder), "--json"))
    assert outcome["rewritten"]["ok"]
