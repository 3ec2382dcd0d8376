"""`rewriter compile --decode` and `rewriter run --generate`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rewriter.cli import run

TINY = "tests.decode_models:gpt2"


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = run(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_compile_then_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, prompt, output = (str(tmp_path / n) for n in ("x.rwa", "p.npz", "o.npz"))
    code, out, err = call(
        capsys, "compile", TINY, "--decode", "--max-length", "60", "--rule", "*h.0*=elu",
        "--rule", "*=exact", "-o", artifact, "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["artifact"]["decode"]["length"] == 60
    assert report["compiled"]["ok"]
    np.savez(prompt, input_ids=np.arange(10)[None])
    code, out, err = call(
        capsys, "run", artifact, "-i", prompt, "-o", output, "--generate", "50", "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    assert told["outputs"]["tokens"] == {"shape": [1, 50], "dtype": "int64"}
    assert told["tokens_per_second"] > 0
    with np.load(output) as arrays:
        assert arrays["tokens"].shape == (1, 50)
    for number, words in (("60", "up to 60 tokens"), (None, "--generate")):
        more = ["--generate", number] if number else []
        code, _, err = call(capsys, "run", artifact, "-i", prompt, "-o", output, *more)
        assert code == 2
        assert words in " ".join(err.split())
    np.savez(prompt, ids=np.arange(10)[None])
    code, _, err = call(capsys, "run", artifact, "-i", prompt, "-o", output, "--generate", "2")
    assert code == 2
    assert "the prompt input_ids" in " ".join(err.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-length", "9"], "--max-length needs --decode"),
        (["--decode", "--session", "s"], "--session does not go with --decode"),
        (["--decode", "--form", "topk"], "can not be compiled for generation"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.rwa"
    code, _, err = call(capsys, "compile", TINY, "-o", str(path), *options)
    assert code in (1, 2)
    assert words in " ".join(err.split())
    assert not path.exists()


def test_a_model_that_does_not_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "x.rwa")
    code, _, err = call(capsys, "compile", "deit-tiny", "--decode", "-o", path)
    assert code == 2
    assert "decoder-only" in " ".join(err.split())
