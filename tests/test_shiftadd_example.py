"""examples/shiftadd: its stages train and load again; page, picture and record agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.mnist.model import DigitViT
from examples.shiftadd import measure, page, stages
from examples.shiftadd.__main__ import RECORD, read
from examples.shiftadd.pvt import DigitPvt
from examples.shiftadd.stages import SUBJECTS, Subject, built, rows, train
from passes.linears import linear_modules
from passes.plan import Choice, Plan
from rewriter.energy import energy_report


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=lambda s: s.name)
def test_rows_are_trained_alike(subject: Subject) -> None:
    """Every shown row starts from what is trained before it; softmax may take the most steps."""
    order = {s.name: s for s in stages.stages(subject)}
    seen: set[str] = {""}
    for stage in order.values():
        assert stage.start in seen
        seen.add(stage.name)
    for row in rows(subject):
        first = order[row.start]
        assert first.form == row.form
        assert not first.linear
    most = [stages.allowed(subject, row.name) for row in rows(subject)]
    assert most[0] == max(most)
    assert [r.name for r in rows(subject)] == list(page.COLOURS)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """A very small ViT on very few random digits."""
    torch.manual_seed(0)
    model = DigitViT(width=16, heads=2, depth=1, hidden=16).eval()
    part, test = (
        (torch.rand(n, 1, 28, 28), torch.randint(10, (n,))) for n in (100, measure.TEST)
    )  # fmt: skip
    monkeypatch.setattr(stages, "OUT", tmp_path)
    monkeypatch.setattr(stages, "digits", lambda: (part, part, test))
    monkeypatch.setattr(measure, "digits", lambda: (part, part, test))
    monkeypatch.setattr(measure, "ROUNDS", 4)
    later = dict.fromkeys(stages.ROWS, 3)
    rates, middle = (1e-3, 1e-3, 1e-3), "shiftadd, half"
    return Subject("tiny", "Tiny", lambda: model, "exact", "blocks.*", 4, later, rates, middle)


def test_stages_train_from_each_other_and_load_again(tiny: Subject) -> None:
    chain = {s.name: s for s in stages.stages(tiny)}
    image = torch.rand(50, 1, 28, 28)
    for name in ("shiftadd, half", "shiftadd + moe"):
        train(tiny, chain[name])
    half, mixed = (built(tiny, chain[n], image, done=True) for n in
                   ("shiftadd, half", "shiftadd + moe"))  # fmt: skip
    again = built(tiny, chain["shiftadd + moe"], image, done=False)
    layers = linear_modules(again.model)
    assert sorted(layers) == sorted(linear_modules(mixed.model))
    weight = layers["blocks.0.up"].params["multiply"]
    torch.testing.assert_close(weight, half.model.get_parameter("blocks.0.up.weight"))
    assert not torch.equal(weight, linear_modules(mixed.model)["blocks.0.up"].params["multiply"])
    with torch.no_grad():
        assert not torch.equal(mixed.model(image), again.model(image))


def test_a_row_is_measured(tiny: Subject) -> None:
    chain = {s.name: s for s in stages.stages(tiny)}
    for name in ("softmax, half", "softmax"):
        train(tiny, chain[name])
    found = measure.figures(tiny, chain["softmax"])
    assert 0 <= found["accuracy"] <= 1
    assert found["error"] < 1e-3
    assert found["shift"] == 0 < found["mul"]
    times = measure.timed(tiny, [chain["softmax"]])["softmax"]
    assert times["ratio"] == 1
    assert times["ms"] > 0


def test_mixtures_are_counted_with_their_shares() -> None:
    """All tokens to the shifts: only the router multiplies; none: only it and the product do."""
    from rewriter.api import find_sites

    traced, _ = find_sites(torch.nn.Sequential(torch.nn.Linear(8, 6)).eval(), (torch.rand(50, 8),))
    plan = Plan({}, {"0": Choice("moe", {"bits": 4})})
    for share, rows_to_shift in ((1.0, 50), (0.0, 0), (0.3, 15)):
        ops = energy_report(traced, measure.with_shares(plan, {"0": share})).after.ops
        assert ops.total("mul") == 2 * 50 * 8 + (50 - rows_to_shift) * 48
        assert ops.total("shift") == rows_to_shift * 48 + rows_to_shift * 6


def test_the_small_pyramid_takes_digits() -> None:
    pytest.importorskip("transformers")
    assert DigitPvt().eval()(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def record() -> dict[str, Any]:
    return read(RECORD)


def test_page_and_record_agree() -> None:
    assert (page.DOCS / "shiftadd.md").read_text() == page.page(record())
    assert (page.DOCS / "images" / "shiftadd.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_is_whole() -> None:
    made = record()
    for subject in SUBJECTS.values():
        found = page.of(made, subject.name)
        assert [r["row"] for r in found] == [r.name for r in rows(subject)]
        assert all(r["steps"] <= subject.later[r["row"]] for r in found)
    assert page.saving(made["b0"]) == pytest.approx(0.731, abs=5e-4)


def test_the_page_tells_of_minilm_where_it_was_measured() -> None:
    facts = {
        "before": 0.4, "fitted": 0.7, "tuned": 0.75, "fit_seconds": 300.0, "tune_seconds": 120.0,
        "threads": 2, "tune_steps": 90, "texts": 480, "epoch": 56, "fit_cpu": 100.0,
        "tune_cpu": 40.0,
    }  # fmt: skip
    assert "## MiniLM" not in page.page(record() | {"minilm": {}})
    text = page.page(record() | {"minilm": facts})
    assert "0.400 before, 0.700 after a fit without labels of 5 minutes on 2 threads" in text
    assert "hashes learned again every 56 steps" in text


def test_verdicts_say_what_is_missed(tmp_path: Path) -> None:
    made = record()
    for row in made["rows"]:
        row["accuracy"] = {"softmax": 0.97, "hamming": 0.96, "shiftadd": 0.9599}.get(
            row["row"], 0.95
        )
    lines = "\n".join(page.verdicts(made))
    assert lines.count("hamming: within 1 points of softmax: **holds**") == len(SUBJECTS)
    assert lines.count("shiftadd + moe: within 2 points of softmax: **holds**") == len(SUBJECTS)
    for row in made["b0"]:
        row["count_uj"] = 1.0
    assert "**missed**, 0.0% less" in page.verdicts(made)[-1]
    page.draw(made, tmp_path / "images" / "s.png")
    assert (tmp_path / "images" / "s.png").stat().st_size > 5000
