"""Costs are the forms' own counts, and fidelity is what the records say, with gaps told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.forms as bench
import rewriter.form_facts as facts
from passes.form import form_named, forms
from rewriter.cli import run
from rewriter.docs import forms_page


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(facts, "BEFORE", tmp_path / "before.json")
    monkeypatch.setattr(facts, "AFTER", tmp_path / "after.json")
    return tmp_path


def write(path: Path, **rows: dict[str, Any]) -> None:
    path.write_text(json.dumps({"settings": "as measured", "forms": rows}))
    facts.record.cache_clear()


def test_costs_are_relative_to_exact_attention() -> None:
    exact = facts.cost(form_named("exact"))
    assert exact is not None
    assert exact["of_exact"] == 1.0
    assert exact["growth"] == pytest.approx(4.0, rel=1e-3)
    linear = facts.cost(form_named("elu"))
    assert linear is not None
    assert linear["growth"] == pytest.approx(2.0, rel=1e-2)
    assert "times 2.00" in facts.told_cost(linear)


def test_every_form_has_a_cost() -> None:
    assert all(facts.cost(cls()) is not None for cls in forms().values())


def test_gaps_in_the_records_are_told(records: Path) -> None:
    facts.record.cache_clear()
    assert facts.told_fidelity(facts.fidelity("elu")) == "without fit not measured"
    assert facts.cells(facts.fidelity("elu")) == ["", "", ""]
    write(records / "before.json", elu={"output_error": 0.5, "cosine": 0.25}, favor={"why": "no"})
    write(records / "after.json", elu={"cosine": 0.75})
    assert facts.told_fidelity(facts.fidelity("favor")) == "without fit none (no)"
    assert facts.cells(facts.fidelity("elu")) == ["0.500", "0.250", "0.750"]
    told = facts.told_fidelity(facts.fidelity("elu"))
    assert told == "without fit output error 0.500, cosine 0.250; after fit cosine 0.750"


def test_the_page_shows_values_after_a_fit(records: Path) -> None:
    write(records / "before.json", elu={"output_error": 0.5, "cosine": 0.25})
    assert "After a fit" not in forms_page()
    write(records / "after.json", elu={"cosine": 0.975})
    page = forms_page()
    facts.record.cache_clear()
    assert "- After a fit: as measured." in page
    assert "| 0.500 | 0.250 | 0.975 |" in page


def test_a_form_is_shown_with_cost_and_fidelity(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["forms", "hedgehog"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of exact attention)" in shown
    assert "without fit output error" in shown


def test_the_bench_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    class Fake:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def row(self, form: str) -> dict[str, Any]:
            measured.append(form)
            if len(measured) == 3:
                raise KeyboardInterrupt
            return {"output_error": 0.5, "cosine": 0.5}

    monkeypatch.setattr(bench, "Bench", Fake)
    path = tmp_path / "records" / "forms.json"
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--record", str(path)])
    done = measured[:2]
    assert list(json.loads(path.read_text())["forms"]) == done
    assert bench.main(["--record", str(path)]) == 0
    assert measured.count(done[0]) == 1
    assert set(json.loads(path.read_text())["forms"]) == set(forms())
    assert bench.main(["--record", str(path), "--again", done[1]]) == 0
    assert measured.count(done[1]) == 2
