"""Codes of a few bits: what they stand for, and how several are packed into one int32 word.

A code is a sign bit (the highest) and a magnitude. With one term of b bits the magnitude e is 0
(weight 0) or 1 .. 2^(b-1) - 1 for the power 2^(e - (2^(b-1) - 1)): at most 1. With two terms (5
bits) it is two fields of two bits, 0 or 2^(2a - 6), and 0 or 2^(2b - 7).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 32  # columns side by side in the packed words, on every target


@dataclass(frozen=True)
class CodeSpec:
    """Which codes: `bits` 3 to 5, `terms` 1 or 2 (2 with 5 bits only)."""

    bits: int = 4
    terms: int = 1

    @property
    def per(self) -> int:
        """Codes in one word."""
        return 32 // self.bits

    @property
    def key(self) -> str:
        """A short name, part of a kernel's name."""
        return f"b{self.bits}t{self.terms}"

    def magnitudes(self) -> list[float]:
        """The magnitude of every code without its sign, in the order of the codes."""
        if self.terms == 1:
            most = (1 << (self.bits - 1)) - 1
            return [0.0] + [2.0 ** (e - most) for e in range(1, most + 1)]
        first = [0.0] + [2.0 ** (2 * a - 6) for a in (1, 2, 3)]
        second = [0.0] + [2.0 ** (2 * b - 7) for b in (1, 2, 3)]
        return [f + s for f in first for s in second]

    def values(self) -> list[float]:
        """The value of every code: the positive ones, then the negative ones."""
        positive = self.magnitudes()
        return positive + [-m for m in positive]


def nearest(weight: Tensor, spec: CodeSpec) -> Tensor:
    """Codes (int64, of the weight's shape) nearest to `weight`, whose largest level is about 1.

    With one term in the logarithm, as DeepShift rounds; below half the lowest power it is 0.
    """
    size = weight.detach().abs()
    levels = torch.tensor(spec.magnitudes(), dtype=size.dtype)
    order = torch.argsort(levels)
    low, high = levels[order][:-1], levels[order][1:]
    edges = (low + high) / 2 if spec.terms > 1 else torch.sqrt(low * high)
    edges[0] = high[0] / 2
    found = order.to(weight.device)[torch.bucketize(size, edges.to(weight.device))]
    return found + (weight.detach() < 0).long() * (found > 0) * (1 << (spec.bits - 1))


def rounded(weight: Tensor, spec: CodeSpec) -> Tensor:
    """The values of the codes nearest to `weight`; faster than by way of the codes."""
    weight = weight.detach()
    if spec.terms > 1 or weight.dtype != torch.float32:
        return value_of(nearest(weight, spec), spec, weight.dtype)
    size = weight.abs()
    # The exponent of size * sqrt(2) alone: rounded in the logarithm.
    power = ((size * 2.0**0.5).view(torch.int32) & 0x7F800000).view(torch.float32)
    lowest = spec.magnitudes()[1]
    inside = power.clamp(lowest, 1.0)
    return torch.where(size <= lowest / 2, 0.0, torch.copysign(inside, weight))


def value_of(codes: Tensor, spec: CodeSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of codes; exact in every float type of 8 bits of exponent."""
    return torch.tensor(spec.values(), dtype=dtype, device=codes.device)[codes.long()]


def pack(codes: Tensor, spec: CodeSpec) -> Tensor:
    """Codes [N, K] as words int32 [ceil(N / 32), ceil(K / per), 32], zero codes at the ends."""
    n, k = codes.shape
    panels, groups = -(-n // PANEL), -(-k // spec.per)
    whole = torch.zeros(panels * PANEL, groups * spec.per, dtype=torch.int64)
    whole[:n, :k] = codes.cpu()
    parts = whole.view(panels, PANEL, groups, spec.per)
    shifts = torch.arange(spec.per) * spec.bits
    words = (parts << shifts).sum(-1).permute(0, 2, 1)
    signed = torch.where(words >= 2**31, words - 2**32, words)
    return signed.to(torch.int32).contiguous()


def unpack(words: Tensor, spec: CodeSpec, shape: tuple[int, int]) -> Tensor:
    """Inverse of `pack`: codes int64 [N, K]."""
    panels, groups, _ = words.shape
    shifts = torch.arange(spec.per, device=words.device) * spec.bits
    parts = (words.long().unsqueeze(-1) >> shifts) & ((1 << spec.bits) - 1)
    whole = parts.permute(0, 2, 1, 3).reshape(panels * PANEL, groups * spec.per)
    return whole[: shape[0], : shape[1]]
