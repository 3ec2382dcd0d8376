from __future__ import annotations

from typing import Any

import pytest
import torch

from passes.errors import FitError
from rewriter.fidelity import Fidelity, embedding, fidelity, nearest
from tests.fit.models import batches, encoder


class Scaled(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, **batch: Any) -> Any:
        return {"hidden": self.inner(**batch) * self.factor, "ids": batch["input_ids"]}


def test_a_model_against_itself_is_perfect_and_scale_shows_in_the_relative_error() -> None:
    model, data = encoder(), batches(2, 3)
    same = fidelity(model, model, data)
    assert same.cosine_mean == pytest.approx(1.0)
    assert same.relative_error == 0
    assert same.nn_agreement == 1
    assert same.samples == 16
    double = fidelity(Scaled(model, 1.0), Scaled(model, 2.0), data)
    assert double.cosine_min == pytest.approx(1.0)
    assert double.relative_error == pytest.approx(1.0)


def test_padding_does_not_count() -> None:
    model, data = encoder(), batches(1, 5)
    other = [{**data[0], "input_ids": data[0]["input_ids"] + (1 - data[0]["attention_mask"]) * 7}]
    a = embedding(model(**data[0]), data[0])
    torch.testing.assert_close(a, embedding(model(**other[0]), other[0]))


def test_another_model_is_worse_and_few_samples_have_no_neighbours() -> None:
    data = batches(1, 3, size=2)
    far = fidelity(encoder(seed=1), encoder(seed=2), data)
    assert far.nn_agreement is None
    assert far.cosine_mean < 0.9
    assert Fidelity.from_json(far.to_json()) == far


def test_nearest_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0], [0.1, 1.0]])
    assert nearest(rows).tolist() == [1, 0, 3, 2]


def test_own_metric_and_no_batches() -> None:
    data = batches(1, 3)
    made = fidelity(encoder(seed=1), encoder(seed=2), data, lambda out, batch: out[:, 0] * 0 + 1)
    assert made.cosine_mean == pytest.approx(1.0)
    with pytest.raises(FitError, match="at least one batch"):
        fidelity(encoder(), encoder(), [])
