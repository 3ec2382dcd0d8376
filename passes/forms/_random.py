"""Directions for random features of the softmax kernel, drawn once from a seed.

exp(q.k) = E exp(w.q - |q|^2/2) exp(w.k - |k|^2/2) over w ~ N(0, I): a set of directions w makes an
estimate. All functions give [D, R] float64 with directions as columns.
"""

from __future__ import annotations

import functools
import math

import torch


def gaussian(d: int, r: int, seed: int) -> torch.Tensor:
    """Independent draws (plain Monte Carlo)."""
    return torch.randn(d, r, generator=generator(seed), dtype=torch.float64)


@functools.lru_cache(maxsize=64)
def orthogonal(d: int, r: int, seed: int) -> torch.Tensor:
    """Blocks of d orthogonal directions, each with the length of a fresh Gaussian vector."""
    made = generator(seed)
    blocks = []
    for _ in range(-(-r // d)):
        square = torch.randn(d, d, generator=made, dtype=torch.float64)
        rotation, upper = torch.linalg.qr(square)
        rotation = rotation * upper.diagonal().sign()  # or the rotations would not be uniform
        lengths = torch.randn(d, d, generator=made, dtype=torch.float64).norm(dim=0)
        blocks.append(rotation * lengths)
    return torch.cat(blocks, 1)[:, :r]


@functools.lru_cache(maxsize=64)
def cosine_points(d: int, r: int, seed: int) -> torch.Tensor:
    """A quasi-Monte Carlo set: rows of the orthonormal DCT at stratified lengths.

    Block b has the d frequencies of the DCT after a random change of signs (the first block
    without); directions come in pairs w, -w, whose odd errors cancel. The lengths are the
    quantiles (i + 1/2) / n of a Gaussian vector's length, dealt to the directions in the order of
    a seeded permutation.
    """
    made = generator(seed)
    number = -(-r // 2)
    transform = dct(d)
    blocks = []
    for n in range(-(-number // d)):
        signs = torch.randint(0, 2, (d, 1), generator=made, dtype=torch.float64) * 2 - 1
        blocks.append(transform * signs if n else transform)
    lengths = length_quantiles(d, number)[torch.randperm(number, generator=made)]
    half = torch.cat(blocks, 1)[:, :number] * lengths
    return torch.stack([half, -half], 2).reshape(d, -1)[:, :r]


def dct(d: int) -> torch.Tensor:
    """The orthonormal DCT-II, frequencies as columns."""
    place, frequency = torch.arange(d, dtype=torch.float64), torch.arange(d, dtype=torch.float64)
    waves = torch.cos(math.pi / d * (place[:, None] + 0.5) * frequency)
    waves[:, 0] *= math.sqrt(0.5)
    return waves * math.sqrt(2.0 / d)


def length_quantiles(d: int, number: int) -> torch.Tensor:
    """Quantiles (i + 1/2) / number of the length of a Gaussian vector in d dimensions."""
    wanted = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 3.0 * math.sqrt(d) + 10.0)
    half = torch.full_like(wanted, 0.5 * d)
    for _ in range(60):  # bisection of the chi distribution
        middle = (low + high) / 2
        below = torch.special.gammainc(half, middle.square() / 2) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def generator(seed: int) -> torch.Generator:
    """A generator of its own: torch's global one is left alone."""
    return torch.Generator().manual_seed(seed)


def subspace(d: int, r: int, seed: int) -> torch.Tensor:
    """r orthonormal columns in d dimensions; the identity for r = d."""
    if r == d:
        return torch.eye(d, dtype=torch.float64)
    square = torch.randn(d, d, generator=generator(seed), dtype=torch.float64)
    rotation: torch.Tensor = torch.linalg.qr(square)[0]
    return rotation[:, :r]
