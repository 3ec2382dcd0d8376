"""Biases that depend on the difference of two places alone, and products with them.

Places are numbers on a line (T5, ALiBi) or cells of a grid of h by w tokens, row by row (Swin).
Over a line the matrix c_{j - i} is Toeplitz, over a grid it is block-Toeplitz; a convolution,
which the fast Fourier transform does in T log T.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from passes.ops import HIDDEN

_NEAR = 1e-5  # of the largest value: what rounding may do to a difference


def places(grid: tuple[int, ...] | None, queries: int, keys: int) -> torch.Tensor:
    """Number of the difference key - query of each pair, int64 [T, S].

    Over a line (`grid` None) T + S - 1 differences from 1 - T on; over a grid (of T = S tokens)
    the product of 2 g - 1, row by row.
    """
    if grid is None:
        return torch.arange(keys) - torch.arange(queries)[:, None] + (queries - 1)
    at = torch.zeros(queries, keys, dtype=torch.int64)
    axes = [torch.arange(g) for g in grid]
    for axis, size in zip(torch.meshgrid(*axes, indexing="ij"), grid, strict=True):
        cell = axis.flatten()
        at = at * (2 * size - 1) + (cell - cell[:, None] + size - 1)
    return at


def differences(grid: tuple[int, ...] | None, queries: int, keys: int) -> int:
    """How many differences there are."""
    return queries + keys - 1 if grid is None else math.prod(2 * g - 1 for g in grid)


def by_difference(bias: torch.Tensor, grid: tuple[int, ...] | None) -> torch.Tensor:
    """The largest value of each difference [..., N] of bias [..., T, S]; a hidden key hides none.

    Differences that no pair has a finite value for are the lowest float.
    """
    queries, keys = bias.shape[-2:]
    at = places(grid, queries, keys).to(bias.device).flatten().expand(*bias.shape[:-2], -1)
    low = torch.finfo(bias.dtype).min
    table = bias.new_full((*bias.shape[:-2], differences(grid, queries, keys)), low)
    return table.scatter_reduce(-1, at, bias.flatten(-2), "amax")


def relative_product(
    c: torch.Tensor, x: torch.Tensor, grid: tuple[int, ...] | None
) -> torch.Tensor:
    """y_i = sum_j c_{j - i} x_j by Fourier transforms: c [..., N], x [..., S, C] -> [..., T, C].

    Over a line T is N + 1 - S.
    """
    sizes = (x.shape[-2],) if grid is None else grid
    wide = (c.shape[-1],) if grid is None else tuple(2 * g - 1 for g in grid)
    axes = tuple(range(-1 - len(sizes), -1))
    turned = c.reshape(*c.shape[:-1], *wide).flip([a + 1 for a in axes])[..., None]
    signal = x.reshape(*x.shape[:-2], *sizes, x.shape[-1])
    signal = torch.fft.rfftn(signal, s=wide, dim=axes)
    signal = torch.fft.rfftn(turned, s=wide, dim=axes) * signal
    both: torch.Tensor = torch.fft.irfftn(signal, s=wide, dim=axes)
    for axis, size in zip(axes, sizes, strict=True):
        both = both.narrow(axis, size - 1, both.shape[axis] - size + 1)
    return both.flatten(-1 - len(sizes), -2)


def find_relative(biases: Iterable[torch.Tensor]) -> tuple[int, ...] | None:
    """What places the values of a bias [..., T, S] (of several trials) are differences of.

    (w,): of j - i, and one number on each side from a distance of w on. (h, w): of cells of a grid.
    Some keys may be hidden from all. None for any other bias, and where T is not S.
    """
    tables: list[torch.Tensor] = []
    grids: list[tuple[int, ...] | None] | None = None
    for bias in biases:
        queries, keys = bias.shape[-2:]
        if queries != keys or queries < 2 or not bias.is_floating_point():
            return None
        grids = _grids(keys) if grids is None else grids
        grids = [g for g in grids if all(_depends_on(one, g) for one in _samples(bias))]
        if not grids:
            return None
        if grids[0] is None:
            table = by_difference(bias, None)
            tables.append(table.amax(0) if table.dim() == 3 else table)
    if not grids:
        return None
    return (_reach(torch.stack(tables).amax(0)),) if grids[0] is None else grids[0]


def _grids(tokens: int) -> list[tuple[int, ...] | None]:
    """A line, then the grids of so many tokens, square ones first."""
    sides = [h for h in range(2, tokens // 2 + 1) if tokens % h == 0]
    return [None, *sorted(((h, tokens // h) for h in sides), key=lambda g: abs(g[0] - g[1]))]


def _samples(bias: torch.Tensor) -> Iterable[torch.Tensor]:
    """[H or 1, T, S] of each sample of a batch."""
    return bias if bias.dim() == 4 else (bias,)


def _depends_on(bias: torch.Tensor, grid: tuple[int, ...] | None) -> bool:
    """Whether bias [..., T, S] is its own table read back, but for keys hidden from all."""
    hidden = bias <= HIDDEN / 2
    shown = ~hidden.all(-2, keepdim=True)
    if bias.dim() > 2:
        shown = shown.any(-3, keepdim=True)
    again = by_difference(bias, grid)[..., places(grid, *bias.shape[-2:]).to(bias.device)]
    same_hidden = ((again <= HIDDEN / 2) | ~shown) == hidden
    size = bias.masked_fill(hidden, 0.0).abs().max()
    near = (again - bias).abs() <= _NEAR * size
    return bool(same_hidden.all()) and bool((near | hidden).all())


def _reach(table: torch.Tensor) -> int:
    """The least w: a row of [..., 2 T - 1] is one number from w on, and one up to -w."""
    table = table.clamp_min(HIDDEN)
    tokens = (table.shape[-1] + 1) // 2
    size = table.masked_fill(table <= HIDDEN / 2, 0.0).abs().max()
    wide = 0
    for side in (table[..., tokens - 1 :], table[..., :tokens].flip(-1)):
        differs = ((side - side[..., -1:]).abs() > _NEAR * size).flatten(0, -2).any(0)
        at = differs.nonzero()
        wide = max(wide, int(at.max()) + 1 if at.numel() else 0)
    return wide
