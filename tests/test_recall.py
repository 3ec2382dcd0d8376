"""Associative recall: the task itself, that softmax learns it, and that a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rewriter.recall
from passes.errors import UnknownName, UsageError
from rewriter.cli import run
from rewriter.recall import KEYS, VALUES, Cell, Setup, questions, recall, scores
from rewriter.recall_view import page, picture, table


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("pairs", [1, 5, KEYS])
def test_every_answer_is_the_value_shown_with_the_key(pairs: int) -> None:
    words, answers = questions(pairs, 9, torch.Generator().manual_seed(3))
    assert words.shape == (9, 3 * pairs)
    assert answers.shape == (9, pairs)
    for row, wanted in zip(words.tolist(), answers.tolist(), strict=True):
        shown = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(shown) == pairs  # every key once
        assert sorted(row[2 * pairs :]) == sorted(shown)
        assert [shown[key] for key in row[2 * pairs :]] == wanted
        assert all(KEYS <= v < KEYS + VALUES for v in wanted)


def test_softmax_learns_it_and_a_small_state_can_not_hold_it() -> None:
    """The state of `elu` here is 4 heads of 2 x 2 numbers, for 32 pairs."""
    setup = Setup(steps=300, rates=(1e-2,), seeds=1)
    small = Setup(steps=100, width=8, heads=4, rates=(1e-2,), seeds=1)
    exact = recall(["exact"], [4, 8], setup=setup)
    assert [c.pairs for c in exact] == [4, 8]
    assert all(c.accuracy is not None and c.accuracy > 0.9 for c in exact)
    elu = recall(["elu"], [32], setup=small)[0]
    assert elu.accuracy is not None
    assert 0.0 <= elu.accuracy < 0.5


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, setup = tmp_path / "r.json", Setup(steps=3, tested=8, seeds=1)
    trained: list[tuple[str, float]] = []
    whole = rewriter.recall.train_form

    def counted(name: str, pairs: object, setup: Setup, rate: float, *rest: object) -> list[Cell]:
        if len(trained) == 3 and not record.with_suffix(".again").exists():
            raise KeyboardInterrupt
        trained.append((name, rate))
        return whole(name, pairs, setup, rate, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(rewriter.recall, "train_form", counted)
    with pytest.raises(KeyboardInterrupt):
        recall(["exact", "elu"], [2, 3], setup=setup, record=record)
    assert len(json.loads(record.read_text())["cells"]) == 4  # both rates of exact, no half of elu
    record.with_suffix(".again").touch()
    cells = recall(["exact", "elu"], [2, 3], setup=setup, record=record)
    assert trained[3:] == [("elu", 1e-2), ("elu", 5e-3)]
    assert [(c.form, c.pairs) for c in cells] == [
        (f, n) for f in ("exact", "elu") for n in (2, 3) * 2
    ]
    with pytest.raises(UsageError, match="another setup"):
        recall(["exact"], [2, 3], setup=Setup(steps=4), record=record)
    with pytest.raises(UsageError, match="another setup"):
        recall(["exact"], [2], setup=setup, record=record)


def test_the_same_seed_gives_the_same_model() -> None:
    setup = Setup(steps=5, tested=16, rates=(1e-2,))
    before = torch.random.get_rng_state()
    (a, other), (b, _) = (recall(["hedgehog"], [4], setup=setup) for _ in range(2))
    assert a.loss == b.loss
    assert (a.seed, other.seed) == (0, 1)
    assert a.loss != other.loss
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_form_is_scored_at_its_best_rate() -> None:
    right = {(0.1, 0): (0.9, 0.1), (0.1, 1): (0.7, 0.3), (0.2, 0): (1.0, 0.2), (0.2, 1): (0.2, 0.1)}
    cells = [
        Cell("a", pairs, accuracy, 0.0, rate, seed)
        for (rate, seed), both in right.items()
        for pairs, accuracy in zip((4, 8), both, strict=True)
    ]
    easy, hard = scores([*cells, Cell("b", 4, None, why="no")])
    assert (easy.pairs, easy.mean, easy.least, easy.largest) == (4, 0.8, 0.7, 0.9)
    assert (hard.pairs, hard.rate) == (8, 0.1)


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownName, match="elu"):
        recall(["ellu"], [4])
    with pytest.raises(UsageError, match="from 1 to 128"):
        recall(["elu"], [0])
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(UsageError, match="not a record"):
        recall(["elu"], [4], record=tmp_path / "bad.json")
    for option, value in (("--pairs", "x"), ("--pairs", "1.5"), ("--rates", "x"), ("--rates", "2")):
        assert run(["recall", "--forms", "elu", option, value]) == 2
        assert option.strip("-") in capsys.readouterr().err


def test_the_command_line_draws_and_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "r.png"
    command = ["recall", "--forms", "exact,elu", "--pairs", "2,4", "--steps", "2",
               "--rates", "0.01", "--seeds", "1"]  # fmt: skip
    assert run([*command, "--picture", str(png), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(c["form"], c["pairs"]) for c in data["cells"]] == [
        ("exact", 2), ("exact", 4), ("elu", 2), ("elu", 4),
    ]  # fmt: skip
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_the_page_compares_rebased_with_based() -> None:
    right = {"exact": (1.0, 1.0), "rebased": (0.9, 0.8), "taylor": (0.7, 0.9)}
    cells = [
        Cell(name, pairs, accuracy, 0.0, 1e-2, seed)
        for name, both in right.items()
        for pairs, accuracy in zip((4, 8), both, strict=True)
        for seed in (0, 1)
    ]
    head = {"setup": {**vars(Setup())}, "pairs": [4, 8]}
    text = page(head, [*cells, Cell("linformer", 4, None, why="not causal")], "r.png")
    assert "above at 4 pairs; below at 8 pairs" in text
    assert "| exact | 2,048 | 1.00 (1.00-1.00)" in text  # a block of 64 keys and values of 16
    assert "`elu`" in text.split("Not measured yet")[1]
    assert "- not causal" in text


def test_a_refused_form_is_shown_as_refused(tmp_path: Path) -> None:
    cells = [
        Cell("exact", 4, 0.5),
        Cell("b", 4, None, why="b can not be causal"),
    ]
    picture(cells, tmp_path / "x.png")
    made = table(cells)
    assert list(made.columns[1].cells) == ["0.500", "refused"]
