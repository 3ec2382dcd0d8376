from __future__ import annotations

from typing import Any

import pytest
import torch

from passes.errors import FitError
from rewriter.calibration import (
    LICENCES,
    check_batches,
    installed_documents,
    passages,
    set_aside,
    split_sentences,
    text_batches,
)
from tests.fit.models import batches, rewritten


class Words:
    """A stand-in tokenizer: one id a word."""

    def __call__(
        self, texts: list[str], max_length: int, padding: Any = False, **_: Any
    ) -> dict[str, Any]:
        ids = [[len(w) for w in t.split()][:max_length] for t in texts]
        if not padding:
            return {"input_ids": ids}
        width = max_length if padding == "max_length" else max(map(len, ids))
        rows = [i + [0] * (width - len(i)) for i in ids]
        masks = [[1] * len(i) + [0] * (width - len(i)) for i in ids]
        return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def test_installed_text_is_real_disjoint_and_seeded() -> None:
    fit, held = split_sentences(seed=3, libraries=False)
    assert len(fit) > 2000
    assert len(held) >= 500
    assert not set(fit) & set(held)
    assert split_sentences(seed=3, libraries=False) == (fit, held)
    assert split_sentences(seed=4, libraries=False)[0] != fit
    assert min(len(t.split()) for t in fit) >= 6


def test_no_document_is_both_fitted_on_and_held_out() -> None:
    held = set(split_sentences(seed=5, libraries=False)[1])
    documents = installed_documents()
    whole = [name for name, texts in documents.items() if set(texts) <= held]
    assert sum(len(documents[name]) for name in whole) == len(held)
    assert len(whole) > 5
    assert LICENCES not in whole


def test_few_batches_choose_the_best_state_however_many_there_are() -> None:
    for count, size, most in ((4, 8, 9), (96, 8, 9), (400, 8, 9), (700, 1, 70), (400, 64, 9)):
        data = [{"x": torch.full((size,), float(i))} for i in range(count)]
        train, aside = set_aside(data)
        assert 2 <= len(aside) <= most
        assert len(aside) * size >= min(count * size // 12, 60)
        assert len(train) + len(aside) == count
        taken = sorted(int(b["x"][0]) for b in aside)
        assert taken[0] < count / 2 < taken[-1] + 1  # spread over the lengths


def test_passages_have_mixed_lengths() -> None:
    made = passages(split_sentences(libraries=False)[0], 60, seed=1)
    lengths = sorted(len(t.split()) for t in made)
    assert lengths[0] < 20
    assert lengths[-1] > 60
    assert passages(split_sentences(libraries=False)[0], 60, seed=1) == made
    with pytest.raises(FitError, match="no text"):
        passages([], 3)


def test_batches_hold_texts_of_like_length_cut_and_padded() -> None:
    texts = ["a " * n for n in (3, 50, 4, 49, 5, 48, 6)]
    made = text_batches(Words(), texts, batch=3, tokens=40)
    assert [b["input_ids"].shape for b in made] == [(3, 5), (3, 40), (1, 40)]
    full = text_batches(Words(), texts, batch=3, tokens=40, full=True)
    assert [b["input_ids"].shape for b in full] == [(3, 40), (3, 40)]
    with pytest.raises(FitError, match="do not fill"):
        text_batches(Words(), texts[:2], batch=3, full=True)
    with pytest.raises(FitError, match="not pixel_values"):
        text_batches(Words(), texts, names=("pixel_values",))


def damaged(how: str) -> Any:
    good = batches(2, 1)
    if how == "empty":
        return []
    if how == "one dict":
        return good[0]
    if how == "list of tuples":
        return [tuple(good[0].values())]
    if how == "missing":
        return [good[0], {"input_ids": good[1]["input_ids"]}]
    if how == "unknown":
        return [{**good[0], "pixels": torch.zeros(2)}]
    if how == "shape":
        return [{n: t[:, :-1] for n, t in good[0].items()}]
    if how == "rank":
        return [{n: t[0] for n, t in good[0].items()}]
    if how == "dtype":
        return [{n: t.float() for n, t in good[0].items()}]
    return [{n: t.tolist() for n, t in good[0].items()}]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("empty", "is empty"),
        ("one dict", "must be a list"),
        ("list of tuples", "batch 0 is a tuple"),
        ("missing", "batch 1 misses attention_mask"),
        ("unknown", "unknown pixels"),
        ("shape", r"shape \[8, 19\] does not fit \[8, 20\]"),
        ("rank", "does not fit"),
        ("dtype", "dtype torch.float32"),
        ("lists", "is a list, not a tensor"),
    ],
)
def test_bad_data_is_refused_with_the_reason(how: str, told: str) -> None:
    with pytest.raises(FitError, match=told):
        check_batches(damaged(how), rewritten().traced)


def test_values_that_are_not_finite_are_refused() -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    example = {"x": torch.randn(1, 2, 5, 4)}
    traced = rewritten(Mean(), "elu", example).traced
    check_batches([example], traced)
    for bad in (torch.nan, torch.inf):
        x = example["x"].clone()
        x[0, 0, 1, 1] = bad
        with pytest.raises(FitError, match="batch 1, x: has NaN or infinite"):
            check_batches([example, {"x": x}], traced)
