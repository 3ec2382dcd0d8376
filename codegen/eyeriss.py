"""The accelerator model of ShiftAddViT: energy and time of a layer on a spatial array.

A row-stationary array (Eyeriss; Chen, Krishna, Emer, Sze, ISSCC 2016) as in the hardware model
released with H. You et al., "ShiftAddViT" (NeurIPS 2023): a layer is seven nested loops, every
way to cut them over registers, array, buffer and DRAM is tried, and one that is good in energy and
in time is taken. Unit costs are those of the same source. A model, not a measurement.

Loops: N rows or images, M outputs, C inputs, E x F the output image, R x S the kernel, H x W the
input image; N = N0 N3, M = M0 M1 M2 M3, C = C0 C1 C2, E = E1 E3.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.energy import HOROWITZ_45NM

ARRAY = 16 * 12  # processing elements
REGISTERS = 192 * 5  # words beside the array's elements, for weights
ROW = 12
OUTPUTS = 16
BUFFER = 65536  # words on the chip
CYCLE_NS = 4.0  # 250 MHz
# Picojoules for a 16-bit word.
DRAM, GLOBAL, NETWORK, PARTIAL, REGISTER, WEIGHTS = 200.0, 22.2, 7.4, 3.7, 3.7, 7.4
BITS = 32
SHIFT_BITS = (16 + 5) // 2  # 16-bit values and 5-bit weights, as the model averages them

Ints = NDArray[np.int64]


class Kind(StrEnum):
    """What the array computes with: products, additions of chosen values, or shifts."""

    MULTIPLY = "multiply"
    ADD = "add"
    SHIFT = "shift"


@dataclass(frozen=True)
class Nest:
    """The sizes of one layer; a matrix product has E = F = R = S = H = W = 1."""

    N: int
    M: int
    C: int
    E: int = 1
    F: int = 1
    R: int = 1
    S: int = 1
    H: int = 1
    W: int = 1
    stride: int = 1
    kind: Kind = Kind.MULTIPLY

    @property
    def operations(self) -> int:
        """Products (or additions, or shifts)."""
        return self.N * self.M * self.C * self.E * self.F * self.R * self.S


@dataclass(frozen=True)
class Estimate:
    """Millijoules in all and of arithmetic alone, and milliseconds."""

    energy_mj: float
    arithmetic_mj: float
    latency_ms: float

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            self.energy_mj + other.energy_mj,
            self.arithmetic_mj + other.arithmetic_mj,
            self.latency_ms + other.latency_ms,
        )

    def __mul__(self, times: float) -> Estimate:
        return Estimate(self.energy_mj * times, self.arithmetic_mj * times, self.latency_ms * times)


def unit_cost(kind: Kind) -> float:
    """Picojoules of one operation; what accumulates a product or a shift is not charged."""
    op = {Kind.MULTIPLY: ("mul", "float32"), Kind.ADD: ("add", "float32")}
    return HOROWITZ_45NM.picojoules[op.get(kind, ("shift", "int32"))]


@functools.lru_cache(maxsize=4096)
def estimate(nest: Nest) -> Estimate:
    """The cost of one layer with its best tiling.

    Raises:
        ValueError: no tiling fits the array (a kernel larger than its rows).
    """
    cut = _tilings(nest)
    energy, latency = _traffic(nest, cut), _cycles(nest, cut) * CYCLE_NS * 1e-6
    arithmetic = nest.operations * unit_cost(nest.kind) * 1e-9
    energy = energy * 1e-9 + arithmetic
    if nest.kind is Kind.SHIFT:
        latency = latency * SHIFT_BITS / BITS
    worse = (energy - energy.min()) / energy.max() + (latency - latency.min()) / latency.max()
    best = int(worse.argmin())
    return Estimate(float(energy[best]), arithmetic, float(latency[best]))


def factors(n: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write `n` as an ordered product of `parts` factors."""
    if parts == 1:
        return [(n,)]
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [(d, *rest) for d in divisors for rest in factors(n // d, parts - 1)]


def _tilings(nest: Nest) -> dict[str, Ints]:
    """Every tiling that fits, as columns N0 N3 M0.. C0.. E1 E3."""
    m = np.array(factors(nest.M, 4), np.int64)
    c = np.array(factors(nest.C, 3), np.int64)
    m, c = m[m[:, 0] <= OUTPUTS], c[c[:, 0] * nest.S < ROW]
    conv = nest.R > 1 or nest.E > 1
    e = np.array([f for f in factors(nest.E, 2) if not conv or f[0] != 1], np.int64)
    n = np.array(factors(nest.N, 2), np.int64)
    if not len(m) or not len(c) or not len(e):
        raise ValueError(f"{nest} fits the array in no way")
    at = np.meshgrid(*(np.arange(len(x)) for x in (m, c, e, n)), indexing="ij")
    m, c, e, n = (x[i.ravel()] for x, i in zip((m, c, e, n), at, strict=True))
    names = ("M0", "M1", "M2", "M3", "C0", "C1", "C2", "E1", "E3", "N0", "N3")
    cut = dict(zip(names, np.concatenate([m, c, e, n], 1).T, strict=True))
    wide = (nest.F - 1) * nest.stride + nest.S
    tall = (cut["E1"] - 1) * nest.stride + nest.R
    inside = cut["N0"] * cut["C1"] * cut["C0"] * tall * wide
    inside = inside + cut["N0"] * cut["M2"] * cut["M1"] * cut["M0"] * cut["E1"] * nest.F
    fits = (cut["M1"] * cut["C1"] * cut["E1"] * nest.R < ARRAY) & (inside < BUFFER)
    fits &= cut["M0"] * cut["C0"] * nest.S < REGISTERS
    if not fits.any():
        raise ValueError(f"{nest} fits the array in no way")
    return {name: column[fits] for name, column in cut.items()}


def _traffic(nest: Nest, t: dict[str, Ints]) -> Any:
    """Picojoules of moving data, for every tiling."""
    bits = SHIFT_BITS if nest.kind is Kind.SHIFT else BITS
    inputs = nest.N * nest.H * nest.W * nest.C
    weights = nest.R * nest.S * nest.C * nest.M
    outputs = nest.N * nest.E * nest.F * nest.M
    tall, wide = nest.R * nest.E / nest.H, nest.S * nest.F / nest.W
    at_least_one = functools.partial(np.maximum, 1)
    dram = t["M3"] * inputs + t["N3"] * t["E3"] * weights + outputs
    chip = t["M3"] * t["M2"] * inputs + at_least_one(2 * (t["C2"] - 1)) * outputs
    network = t["M3"] * t["M2"] * t["M1"] * tall * inputs + t["N3"] * t["E3"] * t["E1"] * weights
    partial = at_least_one(t["C2"] * (t["C1"] * nest.R - 1)) * outputs
    reads = t["M3"] * t["M2"] * t["M1"] * t["M0"] * tall * wide * inputs
    reads = reads + at_least_one(2 * t["C2"] * t["C1"] * nest.R * (t["C0"] * nest.S - 1)) * outputs
    held = t["N3"] * t["E3"] * t["E1"] * nest.F * t["N0"] * weights
    moved = REGISTER * reads + WEIGHTS * held
    if nest.kind is not Kind.ADD:  # operands of additions are taken to be on the array
        moved = moved + DRAM * dram + GLOBAL * chip + NETWORK * network + PARTIAL * partial
    return moved * (bits / 16)


def _cycles(nest: Nest, t: dict[str, Ints]) -> Any:
    outer = t["N3"] * t["N0"] * t["M3"] * t["M2"] * t["M0"] * t["C2"] * t["C0"] * t["E3"]
    return outer * (nest.F * nest.S)
