"""A user's mistakes at the command line: one message that names the argument, nothing left behind.

Mistakes in what is written or read are found before the work, not after it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import rewriter
from passes.errors import NothingRewritten, PathError, RewriterError, UsageError
from rewriter.cli import run

TINY = "tests.cli_factories:encoder"
NONE = "tests.cli_factories:no_attention"
FIT = f"compile {TINY} --form hedgehog --fit 3 -o a.rwa --data"

# (command, exit code, what the message says)
MISTAKES = [
    ("sites nofile.pt2", 2, "nofile.pt2"),
    ("sites other.pt2", 2, "not an exported program"),
    ("sites empty", 2, "config.json is missing"),
    ("sites tests.cli_factories:raises", 2, "the weights went missing"),
    ("sites tests.cli_factories:encodr", 2, "did you mean encoder"),
    ("sites tests.cli_factories:branches", 1, "data-dependent"),
    (f"rewrite {NONE} --form elu", 1, "no attention was found"),
    (f"fit {NONE} --form elu -o f", 1, "no attention was found"),
    (f"rewrite {TINY} --form hedgehg", 2, "did you mean hedgehog"),
    (f"rewrite {TINY} --form elu --set a", 2, "expected NAME=VALUE"),
    (f"rewrite {TINY} --plan bad.json", 2, "not JSON"),
    (f"rewrite {TINY} --rule foo=elu", 2, "matches no site"),
    (f"rewrite {TINY} --form elu --html /nofolder/x.html", 2, "--html"),
    (f"rewrite {TINY} --form elu -o /nofolder/x", 2, "create it first"),
    (f"rewrite {TINY} --form elu -o empty.txt", 2, "not a rewritten model"),
    (f"rewrite {TINY} --form elu -o foreign", 2, "not a rewritten model"),
    (f"compile {TINY} --target cpux -o a.rwa", 2, "did you mean cpu"),
    (f"compile {TINY} -o /proc/x.rwa", 2, "--output /proc/x.rwa"),
    (f"compile {TINY} -o empty", 2, "is a folder"),
    (f"compile {TINY} --html /nofolder/x.html -o a.rwa", 2, "--html"),
    (f"compile {TINY} --form elu --fit -1 -o a.rwa", 2, "--fit"),
    (f"compile {TINY} --form elu --fit nan -o a.rwa", 2, "--fit"),
    (f"compile {TINY} --max-drop 0.5 -o a.rwa", 2, "--max-drop"),
    (f"compile {TINY} --form elu --max-drop 7 -o a.rwa", 2, "--max-drop"),
    (f"compile {TINY} --form elu --fit 3 -o a.rwa", 2, "give --data"),
    (f"{FIT} nan.npz", 1, "NaN or infinite"),
    (f"{FIT} none.npz", 1, "at least 16 samples"),
    (f"{FIT} shape.npz", 1, "does not fit"),
    (f"{FIT} name.npz", 2, "lacks src"),
    (f"{FIT} nofile.npz", 2, "no such file"),
    (f"fit {TINY} --form hedgehog --seconds 0 --data good.npz -o f", 2, "--seconds"),
    (f"fit {TINY} --form hedgehog --data good.npz -o empty.txt", 2, "--output empty.txt"),
    (f"compile {TINY} --from empty -o a.rwa", 2, "--from empty"),
    ("run other.rwa --input good.npz -o y.npz", 1, "not an artifact"),
    ("run nofile.rwa --input good.npz -o y.npz", 2, "no such file"),
    ("run other.rwa --input good.npz -o /nofolder/y.npz", 2, "--output"),
    (f"bench {TINY} --against eagr", 2, "did you mean eager"),
    (f"bench {TINY} --against ,", 2, "names no engine"),
    ("report bad.json", 2, "not JSON"),
    ("report other.rwa --html /nofolder/x.html", 2, "--html"),
    ("demo -o empty.txt", 2, "--output empty.txt"),
    ("demo --json /nofolder/x.json", 2, "--json"),
    ("demo --form foo", 2, "unknown form"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.json").write_text("{")
    for name in ("other.pt2", "other.rwa"):
        (tmp_path / name).write_text("hello")
    good = np.random.default_rng().normal(size=(32, 24, 32)).astype(np.float32)
    np.savez(tmp_path / "good.npz", src=good)
    np.savez(tmp_path / "nan.npz", src=np.where(good > 2, np.nan, good))
    np.savez(tmp_path / "none.npz", src=good[:0])
    np.savez(tmp_path / "shape.npz", src=good[:, :, :7])
    np.savez(tmp_path / "name.npz", x=good)
    return tmp_path


@pytest.mark.parametrize(("command", "code", "told"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_one_message_and_nothing_left(
    command: str, code: int, told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir(folder))
    start = time.monotonic()
    got = run(command.split())
    err = capsys.readouterr().err
    assert got == code, err
    assert told in " ".join(err.split())
    assert "Traceback" not in err
    assert "unexpected" not in err
    assert sorted(os.listdir(folder)) == before
    assert (folder / "foreign" / "thesis.tex").read_text() == "mine"
    assert time.monotonic() - start < 60  # found before the work


def test_numpys_float64_is_taken_as_the_models_type(folder: Path) -> None:
    wide = np.load(folder / "good.npz")["src"].astype(np.float64)
    np.savez(folder / "wide.npz", src=wide)
    command = f"fit {TINY} --form hedgehog --seconds 1 --data wide.npz -o fitted"
    assert run(command.split()) == 0
    assert (folder / "fitted" / "meta.json").exists()
    assert not (folder / "fitted.state").exists()


def test_data_that_never_varies_is_fitted_to_nothing(folder: Path) -> None:
    np.savez(folder / "zeros.npz", src=np.zeros((32, 24, 32), np.float32))
    command = f"fit {TINY} --form hedgehog --seconds 1 --data zeros.npz -o fitted"
    assert run(command.split()) == 0


def encoder() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from tests.cli_factories import encoder as made

    return made()


def test_the_python_door_says_the_same(tmp_path: Path) -> None:
    from tests.cli_factories import no_attention

    model, inputs = encoder()
    with pytest.raises(NothingRewritten, match="no attention was found"):
        rewriter.rewrite(*no_attention(), form="elu")
    with pytest.raises(UsageError, match="exactly one of form, plan and rules"):
        rewriter.rewrite(model, inputs)
    with pytest.raises(UsageError, match="on_noop"):
        rewriter.rewrite(model, inputs, form="elu", on_noop="no")
    with pytest.raises(UsageError, match="data"):
        rewriter.rewrite(model, inputs, form="elu", fit_seconds=3)
    with pytest.raises(PathError, match="does not exist"):
        rewriter.compile(model, inputs, path=tmp_path / "no" / "x.rwa")
    with pytest.raises(RewriterError, match="no such file"):
        rewriter.load(tmp_path / "x.rwa")
    with pytest.raises(UsageError, match="unknown target"):
        rewriter.compile(model, inputs, path=tmp_path / "x.rwa", target="cpux")
    with pytest.raises(UsageError, match="example_inputs"):
        rewriter.compile(model, path=tmp_path / "x.rwa")
    assert not list(tmp_path.iterdir())
