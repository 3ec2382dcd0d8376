"""Names at the ends of lines: none covers another, and each is as near to its line as it can be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from passes.form import forms
from rewriter.line_labels import COLOURS, family_legend, lines_of, name_ends, spread


def test_places_keep_their_distance_and_stay_near() -> None:
    assert spread([], 1.0) == []
    assert spread([0.0, 5.0, 9.0], 1.0) == [0.0, 5.0, 9.0]
    assert spread([1.0, 1.0, 1.0], 1.0) == pytest.approx([0.0, 1.0, 2.0])
    assert spread([0.0, 2.0, 2.0], 1.0) == pytest.approx([0.0, 1.5, 2.5])
    assert spread([0.9, 1.0, 1.0], 0.1, 0.0, 1.0) == pytest.approx([0.8, 0.9, 1.0])
    assert spread([0.0, 0.0], 0.1, 0.0, 1.0) == pytest.approx([0.0, 0.1])
    assert spread([0.5, 0.5], 2.0, 0.0, 1.0) == pytest.approx([0.0, 2.0])
    draw = np.random.default_rng()
    for _ in range(20):
        wanted, gap = sorted(draw.random(12)), 0.07
        found = spread(wanted, gap)
        assert all(b - a >= gap - 1e-12 for a, b in itertools.pairwise(found))
        cost = sum((a - b) ** 2 for a, b in zip(found, wanted, strict=True))
        for _ in range(20):  # no other places that keep the distance cost less
            other = np.array(found) + draw.normal(0, 0.01, 12)
            other = np.maximum.accumulate(other - gap * np.arange(12)) + gap * np.arange(12)
            assert cost <= float(np.sum((other - wanted) ** 2)) + 1e-12


def test_every_family_has_its_colour() -> None:
    assert {form.family for form in forms().values()} <= set(COLOURS)
    lines = lines_of({"exact": {2: 1.0}, "mgk": {2: 1.0}, "elu": {4: 2.0, 2: 1.0}, "?": {2: 1.0}})
    assert [line.family for line in lines] == ["exact", "exact", "kernelised", ""]
    assert lines[2].x == [2, 4]
    assert lines[0].style != lines[1].style


def test_names_of_lines_that_end_together_do_not_overlap() -> None:
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    names = [name for name in forms() if name != "exact"]
    lines = lines_of({name: {1: 1.0, 2: 2.0 + i % 3} for i, name in enumerate(["exact", *names])})
    for line in lines:
        line.draw(axes)
    axes.set_yscale("log")
    family_legend(axes, lines, "upper left")
    name_ends(axes, lines)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the leading line
    assert len(boxes) == len(lines)
    middles = sorted(box.y0 + box.height / 2 for box in boxes)
    assert min(b - a for a, b in itertools.pairwise(middles)) >= 8 * figure.dpi / 72
    assert axes.get_legend() is not None
