"""Pictures of two-expert layers: on the page, as files, and true to the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from passes.errors import ArtifactError, UsageError
from rewriter.html import page
from rewriter.moe_plots import balance, charts, patches, save_pictures, shares
from rewriter.report import RewriteReport
from tests.report.samples import report
from tests.report.test_html import EVIL, check

EXPERTS: dict[str, Any] = {
    "times": [{"multiply": 3.0, "shift": 1.0, "layers": ["b.up", EVIL]}],
    "routing": [
        {"layer": "b.up", "multiply": 30, "shift": 10, "patches": [[0, 1, 1], [1, 0, 0]]},
        {"layer": EVIL, "multiply": 0, "shift": 0, "patches": None},
    ],
    "training": [
        {"step": n, "task": 1.0, "balance": 1 / n, "shift": 0.5 + n / 50} for n in (1, 2, 3)
    ],
    "image": [[0, 15, 15], [7, 7, 0]],
}


def with_experts(**change: Any) -> RewriteReport:
    kept = {k: v for k, v in {**EXPERTS, **change}.items() if v}
    return replace(report(2), experts=kept)


@pytest.mark.parametrize("missing", ["", "times", "training", "image"])
def test_the_page_is_whole(missing: str) -> None:
    html = page(with_experts(**({missing: []} if missing else {})))
    check(html)
    assert "Two-expert layers" in html
    assert ("step by step" in html) == (missing != "training")
    assert "Which patches go where" in html
    assert "Two-expert layers" not in page(report(2))
    assert set(charts(report(2)).values()) == {""}


def test_files_are_written_for_what_there_is(tmp_path: Path) -> None:
    names = [p.name for p in save_pictures(with_experts(), tmp_path / "new" / "folder")]
    assert names == ["moe-balance.png", "moe-shares.png", "moe-patches.png"]
    for name in names:
        assert (tmp_path / "new" / "folder" / name).read_bytes().startswith(b"\x89PNG")
    plain = [{**row, "patches": None} for row in EXPERTS["routing"]]
    few = save_pictures(with_experts(routing=plain, training=[]), tmp_path)
    assert [p.name for p in few] == ["moe-shares.png"]
    with pytest.raises(UsageError, match="--linear moe"):
        save_pictures(report(2), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file"):
        save_pictures(with_experts(), tmp_path / "file")


def test_bars_lines_and_squares_are_the_data() -> None:
    figure = shares(EXPERTS)
    assert figure is not None
    bars = sorted((round(b.get_x(), 6), round(b.get_width(), 6)) for b in figure.axes[0].patches)
    assert bars == [(0.0, 0.0), (0.0, 0.0), (0.0, 0.75), (0.75, 0.25)]
    figure = balance(EXPERTS)
    assert figure is not None
    loss, share = figure.axes
    assert list(loss.lines[0].get_ydata()) == [1, 1 / 2, 1 / 3]
    assert list(share.lines[1].get_ydata()) == [0.75, 0.75]  # shift takes a third of the time
    figure = patches(EXPERTS)
    assert figure is not None
    image, up = figure.axes[:2]
    assert len(image.patches) == 4  # runs of equal squares are one shape
    assert [(p.get_x(), p.get_y(), p.get_width()) for p in up.patches] == [
        (0, 0, 1), (1, 0, 2), (0, 1, 1), (1, 1, 2),
    ]  # fmt: skip
    assert balance({}) is None
    assert patches({"routing": [{"patches": None}]}) is None
