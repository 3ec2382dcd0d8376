"""The command line: help, exit codes, JSON contracts, and no traceback for a user's mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rewriter.cli import run
from rewriter.cli.app import VERBS

TINY = "tests.cli_factories:encoder"


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = run(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, verb, "--help")
    assert code == 0
    assert "Example" in out
    assert f"rewriter {verb}" in " ".join(out.split())


def test_the_sites_contract(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "sites", TINY, "--json")
    data = json.loads(out)
    assert code == 0
    assert len(data["sites"]) == 2
    assert {"id", "status", "dims", "mask", "cross", "causal", "source"} <= set(data["sites"][0])
    assert data["near_misses"] == []


@pytest.mark.parametrize("verb", ["forms", "targets", "models", "doctor"])
def test_listing_verbs_print_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, verb, "--json")
    assert code == 0
    assert json.loads(out)


def test_compile_run_verify_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = tmp_path / "tiny.rwa"
    page = tmp_path / "tiny.html"
    code, out, err = call(
        capsys, "compile", TINY, "--form", "elu", "-o", str(artifact), "--html", str(page), "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    assert (report["sites_found"], report["sites_rewritten"]) == (2, 2)
    assert report["compiled_max_abs_error"] < 1e-4
    assert {"cosine_mean", "relative_error"} <= set(report["fidelity"])
    assert all(k["name"] and k["scheduled_by"] for k in report["kernels"])
    assert "<html" in page.read_text()

    from tests.cli_factories import encoder

    _, inputs = encoder()
    values = {n: t.numpy() for n, t in inputs.items()}
    np.savez(tmp_path / "x.npz", **values)
    code, _, err = call(
        capsys,
        "run",
        str(artifact),
        "--input",
        str(tmp_path / "x.npz"),
        "-o",
        str(tmp_path / "y.npz"),
    )
    assert code == 0, err
    with np.load(tmp_path / "y.npz") as outputs:
        assert all(np.isfinite(outputs[name]).all() for name in outputs.files)

    code, out, err = call(capsys, "verify", str(artifact), TINY, "--json")
    assert code == 0, err
    assert json.loads(out)["rewritten"]["ok"]
    code, out, _ = call(capsys, "report", str(artifact), "--json")
    assert code == 0
    assert json.loads(out)["sites_rewritten"] == 2


def test_a_rewritten_folder_is_compiled_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rewritten"
    code, _, err = call(capsys, "rewrite", TINY, "--rule", "*layers.0*=hedgehog", "-o", str(folder))
    assert code == 0, err
    code, out, err = call(
        capsys, "compile", TINY, "--from", str(folder), "-o", str(tmp_path / "a.rwa"), "--json"
    )
    assert code == 0, err
    assert json.loads(out)["sites_rewritten"] == 1


MISTAKES = {
    "missing file": (["sites", "no/such/folder"], "no/such/folder"),
    "near model": (["sites", "minilmm"], "minilm"),
    "near form": (["rewrite", TINY, "--form", "hedghog"], "hedgehog"),
    "near target": (["compile", TINY, "--target", "cpuu", "-o", "x.rwa"], "cpu"),
    "pattern without site": (["rewrite", TINY, "--rule", "decoder.*=elu"], "matches no site"),
    "form and rule": (["rewrite", TINY, "--form", "elu", "--rule", "*=elu"], "exactly one"),
    "no form": (["rewrite", TINY], "exactly one"),
    "bad rule": (["rewrite", TINY, "--rule", "elu"], "NAME=VALUE"),
    "unknown option": (["rewrite", TINY, "--form", "elu", "--set", "nope=1"], "nope"),
    "factory raises": (["sites", "tests.cli_factories:raises"], "factory"),
    "control flow": (["sites", "tests.cli_factories:branches"], "control flow"),
    "no folder": (["compile", TINY, "-o", "no/such/folder/x.rwa"], "does not exist"),
    "no artifact": (["run", "missing.rwa", "--input", "x.npz", "-o", "y.npz"], "missing.rwa"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_well(
    case: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv, named = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *argv)
    assert code in (1, 2)
    assert named in " ".join((out + err).split())
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


def test_wrong_use_is_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "sites", "--no-such-option")[0] == 2
    assert call(capsys, "nonsense")[0] == 2
    assert call(capsys, "sites", "minilmm")[0] == 2


def test_a_model_without_attention_is_an_error_unless_allowed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = call(capsys, "rewrite", "tests.cli_factories:no_attention", "--form", "elu")
    assert code == 1
    assert "no attention" in err
    code, out, _ = call(
        capsys,
        "rewrite",
        "tests.cli_factories:no_attention",
        "--form",
        "elu",
        "--allow-none",
        "--json",
    )
    assert code == 0
    assert json.loads(out)["sites_found"] == 0


def test_debug_shows_the_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rewriter", "sites", "minilmm", "--debug"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.slow
def test_interrupted_compile_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rewriter", "compile", TINY, "--form", "elu", "-o"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "x.rwa")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "lower" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    err = process.stderr.read()
    assert process.wait(60) == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_fit_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import rewriter.fit_loop

    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", src=np.random.default_rng().normal(size=(32, 24, 32)).astype(np.float32))
    whole, steps = rewriter.fit_loop.Loop.run, []

    def stop_in_the_second(loop: rewriter.fit_loop.Loop) -> object:
        steps.append(loop)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return whole(loop)

    monkeypatch.setattr(rewriter.fit_loop.Loop, "run", stop_in_the_second)
    command = ["fit", TINY, "--form", "hedgehog", "--seconds", "2", "--data", "x.npz", "-o", "f"]
    code, _, err = call(capsys, *command)
    assert code == 130
    assert "The fit is kept in f.state; the same command goes on" in " ".join(err.split())
    assert not Path("f").exists()
    assert Path("f.state").is_dir()
    code, out, err = call(capsys, *command, "--json")
    assert code == 0, err
    assert json.loads(out)["fit"]["resumed"] == 1
    assert Path("f").is_dir()
    assert not Path("f.state").exists()


def test_an_interrupt_that_comes_back_as_another_error_is_still_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The compiler's runtime gives an empty RuntimeError where Ctrl-C met a callback."""
    import rewriter.cli.forms_verb

    def pressed() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RuntimeError from None

    monkeypatch.setattr(rewriter.cli.forms_verb, "form_rows", pressed)
    code, _, err = call(capsys, "forms")
    assert code == 130
    assert err.strip() == "interrupted."
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
