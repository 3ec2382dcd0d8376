"""Break-even of forms: the arithmetic of the curves, the record, and one real measurement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rewriter.break_even
from codegen.target import target_named, usable_cores
from passes.errors import UnknownName, UsageError
from rewriter.break_even import Curve, Shape, break_even
from rewriter.break_even_view import faster_from, page, picture, table
from rewriter.cli import run
from rewriter.record import read_record

CPU = target_named("cpu")


def curve(ratios: dict[int, float]) -> Curve:
    """Exact attention takes n^2 nanoseconds; the form `ratios` times as long."""
    exact = {n: n * n * 1e-9 for n in ratios}
    return Curve("f", {n: r * exact[n] for n, r in ratios.items()}, exact)


def test_growth_and_break_even_of_known_curves() -> None:
    linear = curve({n: 1000 / n for n in (512, 1024, 2048, 4096)})  # crosses at 1000
    assert linear.growth == pytest.approx(1.0)
    assert linear.break_even == pytest.approx(1000, abs=1)
    assert curve({512: 0.5, 1024: 0.4}).break_even == 0
    never = curve({512: 3.0, 1024: 2.0})
    assert never.break_even is None
    assert faster_from(never) == "not up to 1,024"
    close = curve({512: 1.3, 1024: 0.96})  # within the noise
    assert close.break_even is None
    assert faster_from(close) == "level"
    assert curve({512: 1.0}).growth is None
    # faster, slower, faster: only the last crossing counts
    assert 1024 < (curve({512: 0.9, 1024: 1.5, 2048: 0.5}).break_even or 0) < 2048
    assert Curve.from_json(json.loads(json.dumps(linear.to_json()))) == linear


def test_real_kernels_and_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "r.json"
    shape = Shape(heads=2, width=16)
    options = {"shape": shape, "lengths": (16, 64), "record": record}
    made = break_even(["exact", "elu"], CPU, **options)
    assert [c.form for c in made] == ["exact", "elu"]
    assert all(set(c.seconds) == {16, 64} for c in made)
    assert all(s > 0 for c in made for s in (*c.seconds.values(), *c.exact.values()))
    monkeypatch.setattr(rewriter.break_even, "_curve", None)  # nothing is measured twice
    assert break_even(["elu"], CPU, **options) == made[1:]
    with pytest.raises(UsageError, match="other settings"):
        break_even(["elu"], CPU, shape=Shape(heads=1), lengths=(16, 64), record=record)
    data, curves = read_record(record, "curves", Curve.from_json)
    assert curves == made
    assert data["key"]["threads"] >= 1
    text = page(data, [*curves, Curve("x", why="M04: no")], "p.png")
    assert "2 heads of 16, no mask" in text
    assert "| exact |" in text
    assert "- `x`: M04: no" in text
    assert "--lengths 16,64 --record" in text
    picture(made, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert len(table(made).columns) == 5


def test_every_usable_core_takes_part() -> None:
    # A fresh process: TVM settles its threads once, by its own default at half of the cores.
    others = ("TVM_NUM_THREADS", "OMP_NUM_THREADS")
    told = subprocess.run(
        [sys.executable, "-c", "from codegen.kit_build import pool_threads as n; print(n())"],
        env={k: v for k, v in os.environ.items() if k not in others},
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert int(told.stdout) == usable_cores()


def test_a_span_is_made_to_reach_the_longest_length() -> None:
    assert (
        break_even(["cosformer"], CPU, shape=Shape(1, 8), lengths=(16, 1040))[0].seconds[1040] > 0
    )


def test_a_form_that_refuses_says_why() -> None:
    shape = Shape(causal=True)
    site = shape.site(32)
    assert site.mask.causal
    made = Curve("x", why="M04: no causal")
    assert faster_from(made) == "refused"
    assert made.break_even is None


def test_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="ascending"):
        break_even(["elu"], CPU, lengths=(64, 16))
    with pytest.raises(UsageError, match="not a cpu"):
        break_even(["elu"], target_named("cuda:sm_90"))
    with pytest.raises(UnknownName, match="elu"):
        break_even(["ellu"], CPU)
    assert run(["forms", "ellu"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert run(["forms", "elu", "--break-even", "--lengths", "a"]) == 2
    assert "--lengths" in capsys.readouterr().err


def test_the_list_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["forms"]) == 0
    out = capsys.readouterr().out
    assert "hedgehog" in out
    assert "\u2026" not in out  # nothing is cut off
    assert run(["forms", "all", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["forms"]) > 25
    assert run(["forms", "elu"]) == 0
    assert "Katharopoulos" in capsys.readouterr().out
