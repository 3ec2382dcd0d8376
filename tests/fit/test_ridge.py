from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rewriter.ridge import refit, ridge


def problem(rows: int = 300, noise: float = 0.0) -> tuple[torch.Tensor, ...]:
    x = torch.randn(rows, 12, dtype=torch.float64)
    w, b = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    return x, F.linear(x, w, b) + noise * torch.randn(rows, 5, dtype=torch.float64), w, b


def test_penalty_zero_is_least_squares() -> None:
    x, y, w, b = problem(noise=0.3)
    new, shift = ridge(x, y, w * 0, b * 0, 0.0)
    full = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    assert shift is not None
    torch.testing.assert_close(new, full[:-1].T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shift, full[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_bias", [True, False])
def test_small_penalty_tends_to_least_squares_and_large_to_the_old_weights(with_bias: bool) -> None:
    x, y, _, b = problem(noise=0.3)
    old = torch.randn(5, 12, dtype=torch.float64)
    bias = b if with_bias else None
    exact, _ = ridge(x, y, old, bias, 0.0)
    near, _ = ridge(x, y, old, bias, 1e-10)
    far, _ = ridge(x, y, old, bias, 1e10)
    torch.testing.assert_close(near, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(far, old, rtol=1e-6, atol=1e-6)


def test_it_solves_the_penalised_problem() -> None:
    x, y, _, _ = problem(noise=0.3)
    old, penalty = torch.randn(5, 12, dtype=torch.float64), 0.05
    new, _ = ridge(x, y, old, None, penalty)
    load = penalty * (x.T @ x).trace() / 12
    rows = torch.cat([x, load.sqrt() * torch.eye(12, dtype=torch.float64)])
    wanted = torch.cat([y, load.sqrt() * old.T])
    torch.testing.assert_close(new, torch.linalg.lstsq(rows, wanted).solution.T)


def test_refit_finds_the_weights_and_never_makes_held_out_rows_worse() -> None:
    x, y, w, b = problem(2000, noise=0.01)
    wrong = w + 0.5 * torch.randn_like(w)
    done = refit(x, y, wrong, b)
    assert done.penalty > 0
    assert done.after < 1e-3 < done.before
    kept = refit(x, F.linear(x, w, b), w, b)
    assert kept.after <= kept.before


def test_rows_that_are_not_finite_keep_the_old_weights() -> None:
    x, y, w, b = problem()
    x[3, 4] = torch.nan
    done = refit(x, y, w, b)
    assert done.penalty == 0
    assert done.weight is w
