"""bfloat16 products in the large stages of a fit: who gets them, and that the fit still works."""

from __future__ import annotations

import pytest
import torch

from passes.errors import UsageError
from rewriter.fit import Recipe, fit
from rewriter.fit_precision import arithmetic, has_bfloat16
from tests.fit.models import batches, rewritten


def product(precision: str, dtype: torch.dtype = torch.float32) -> torch.dtype:
    layer = torch.nn.Linear(4, 4).to(dtype)
    with arithmetic(precision, layer):
        return layer(torch.ones(2, 4, dtype=dtype)).dtype


def test_only_float32_models_are_lowered() -> None:
    assert product("bfloat16") is torch.bfloat16
    assert product("float32") is torch.float32
    assert product("bfloat16", torch.float64) is torch.float64
    assert product("auto") is (torch.bfloat16 if has_bfloat16() else torch.float32)
    with arithmetic("bfloat16", torch.nn.GELU()):  # no parameters: nothing to go by
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype is torch.float32


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="precision: 'fp8'"):
        Recipe(precision="fp8")


def test_a_fit_in_bfloat16_ends_near_one_in_float32() -> None:
    def error(precision: str) -> tuple[float, float]:
        made = rewritten()
        recipe = Recipe(site_steps=20, block_steps=40, end_steps=40, precision=precision)
        report = fit(made, batches(8, 1), seconds=600.0, held_out=batches(3, 2), recipe=recipe)
        assert all(p.dtype is torch.float32 for p in made.module.parameters())
        return report.fidelity_before.relative_error, report.fidelity.relative_error

    before, wide = error("float32")
    _, narrow = error("bfloat16")
    assert wide < 0.8 * before
    assert narrow < 1.1 * wide
