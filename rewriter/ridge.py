"""Closed-form refit of the projection after an attention: ridge regression towards its old weights.

One solve a site, without labels: the student's head outputs against the teacher's
projected output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Refit:
    """New weight [O, I] and bias [O] (None where there was none), and squared relative errors on
    held-out rows with the old and the new ones; `penalty` 0 means that the old ones were kept."""

    weight: Tensor
    bias: Tensor | None
    penalty: float
    before: float
    after: float


def ridge(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, penalty: float
) -> tuple[Tensor, Tensor | None]:
    """argmin |x W^T + b - y|^2 + lambda |W - weight|^2, lambda = penalty * trace(x^T x) / I.

    x [N, I], y [N, O], weight [O, I], bias [O]; float64 inside, results in weight's dtype. The
    bias is free (x and y are centred) where there is one. Penalty 0 is least squares.
    """
    a, b, w = x.double(), y.double(), weight.double()
    mean_x = a.mean(0) if bias is not None else a.new_zeros(a.shape[1])
    mean_y = b.mean(0) if bias is not None else b.new_zeros(b.shape[1])
    a, b = a - mean_x, b - mean_y
    gram = a.T @ a
    if penalty > 0:
        # inputs that never vary leave the matrix empty: any load then keeps the old weight
        load = (penalty * gram.trace() / len(gram)).clamp_min(1e-30)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        left = gram + load * eye
        change = torch.linalg.solve(left, a.T @ (b - a @ w.T)).T
        new = w + change
    else:
        new = torch.linalg.lstsq(a, b, driver="gelsd").solution.T
    shift = mean_y - new @ mean_x
    return new.to(weight.dtype), None if bias is None else shift.to(bias.dtype)


def refit(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, held_out: float = 0.2
) -> Refit:
    """The ridge solution whose penalty is best on held-out rows; the old weights if none is better.

    x [N, I], y [N, O]: the last `held_out` share of the rows measures. Values that are not finite
    keep the old weights.
    """
    cut = len(x) - max(1, int(len(x) * held_out))
    before = _error(x[cut:], y[cut:], weight, bias)
    best = Refit(weight, bias, 0.0, before, before)
    if cut < 2 or not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
        return best
    for penalty in PENALTIES:
        new, shift = ridge(x[:cut], y[:cut], weight, bias, penalty)
        error = _error(x[cut:], y[cut:], new, shift)
        if error < best.after:
            best = Refit(new, shift, penalty, before, error)
    return best


def _error(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    wrong = F.linear(x, weight, bias) - y
    return float(wrong.double().square().sum() / y.double().square().sum().clamp_min(1e-30))
