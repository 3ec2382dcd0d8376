"""Binary codes with scales: w = sum_r alpha_r b_r, b = +-1; one set of alphas for each column.

Bit r of a code says whether b_r is +1. Alphas are sums of signed powers of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 12


def signs(bits: int) -> Tensor:
    """[2^bits, bits]: the b of every code."""
    codes = torch.arange(1 << bits)
    return ((codes[:, None] >> torch.arange(bits)) & 1).float() * 2 - 1


def levels_of(alpha: Tensor) -> Tensor:
    """[C, 2^bits]: the value of every code in each column, from alpha [C, bits]."""
    return alpha @ signs(alpha.shape[1]).T.to(alpha)


def summed(codes: Tensor, alpha: Tensor) -> Tensor:
    """The weights [N, C] of codes [N, C] under alpha [C, bits]."""
    return torch.gather(levels_of(alpha), 1, codes.T.long()).T


def nearest_codes(weight: Tensor, alpha: Tensor) -> Tensor:
    """Codes [N, C] of the levels nearest to weight [N, C]."""
    levels, order = levels_of(alpha).sort(dim=1)
    middle = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
    found = torch.searchsorted(middle, weight.T.contiguous())
    return torch.gather(order, 1, found).T


def powers(alpha: Tensor, terms: int) -> Tensor:
    """alpha as the sum of `terms` signed powers of two, each nearest to what is left."""
    made = torch.zeros_like(alpha)
    for _ in range(terms):
        left = alpha - made
        power = left.abs().clamp_min(1e-30).log2().round().clamp_min(-60).exp2()
        made = made + torch.where(left == 0, torch.zeros_like(left), left.sign() * power)
    return made


def fit_alphas(weight: Tensor, bits: int, terms: int) -> Tensor:
    """Alphas [C, bits] for weight [N, C]: from the greedy start by turns with the codes.

    The best round counts, because rounding to powers of two can make one worse.
    """
    alpha = powers(_greedy(weight, bits), terms)
    best, least = alpha, torch.full((weight.shape[1],), torch.inf)
    for _ in range(_ROUNDS):
        codes = nearest_codes(weight, alpha)
        error = (summed(codes, alpha) - weight).square().sum(dim=0)
        better = error < least
        best = torch.where(better[:, None], alpha, best)
        least = torch.where(better, error, least)
        alpha = powers(_least_squares(weight, codes, bits), terms)
    return best


def _greedy(weight: Tensor, bits: int) -> Tensor:
    left, found = weight, []
    for _ in range(bits):
        scale = left.abs().mean(dim=0)
        left = left - torch.where(left >= 0, scale, -scale)
        found.append(scale)
    return torch.stack(found, dim=1)


def _least_squares(weight: Tensor, codes: Tensor, bits: int) -> Tensor:
    b = signs(bits)[codes.T.long()]  # [C, N, bits]
    square = b.transpose(1, 2) @ b + 1e-4 * torch.eye(bits)
    right = b.transpose(1, 2) @ weight.T.unsqueeze(-1)
    solved: Tensor = torch.linalg.solve(square, right).squeeze(-1).abs()
    return solved.sort(dim=1, descending=True).values
