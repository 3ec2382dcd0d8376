"""Closed-form operation counts of products with coded weights (codegen/kernels/coded.py).

The position of a code in its word is a constant once loops are unrolled, so it is not counted.
"""

from __future__ import annotations

from passes.linear_form import LinearSpec
from passes.linear_forms._codes import PANEL, CodeSpec
from passes.opcount import OpCount

FEW = 8  # rows up to which the kernels do not expand the weights into memory


def coded_ops(codes: CodeSpec, spec: LinearSpec, rows: int) -> OpCount:
    """Operations and bytes of one product on `rows` rows.

    One row: every product adds to an exponent. More: weights are made by their bits, anew for
    each of a few rows, once for many; then multiplied.
    """
    panels, groups = -(-spec.outputs // PANEL), -(-spec.inputs // codes.per)
    words = panels * groups * PANEL
    few = panels * PANEL * groups * codes.per
    many = panels * PANEL * spec.inputs
    if rows == 1:
        products = _bits(codes, selects=4, adds=2) * few + OpCount.of(add=few)
    elif rows <= FEW:
        products = (_bits(codes, selects=1, adds=1) * few + OpCount.of(mul=few, add=few)) * rows
    else:
        products = _bits(codes, selects=1, adds=1) * many + OpCount.of(mul=many, add=many) * rows
    out = rows * spec.outputs
    vectors = spec.outputs * (2 if spec.bias else 1)
    read = 4 * (rows * spec.inputs + words + vectors)
    finish = OpCount.of(mul=out, add=out if spec.bias else 0, read=read, written=4 * out)
    return products + finish


def _bits(codes: CodeSpec, *, selects: int, adds: int) -> OpCount:
    """Integer work of one code, and the sum of its terms."""
    t = codes.terms
    whole = OpCount.of("uint32", shift=5 * t, xor=1, select=selects * t, add=adds * t)
    return whole + OpCount.of(add=t - 1)


def binary_ops(codes: CodeSpec, spec: LinearSpec, rows: int) -> OpCount:
    """Operations and bytes of one product with binary codes (codegen/kernels/binary.py).

    One row: the inputs are multiplied by the alphas once, products are sums under signs. More: the
    weights are made once and multiplied.
    """
    panels, groups, bits = -(-spec.outputs // PANEL), -(-spec.inputs // codes.per), codes.bits
    padded = groups * codes.per
    signed = OpCount.of("uint32", shift=3 * bits - 1, xor=bits) + OpCount.of(add=bits - 1)
    if rows == 1:
        few = panels * PANEL * padded
        products = signed * few + OpCount.of(add=few) + OpCount.of(mul=padded * bits)
    else:
        many = panels * PANEL * (padded if rows <= FEW else spec.inputs)
        products = signed * many + OpCount.of(mul=many, add=many) * rows
    out = rows * spec.outputs
    vectors = spec.outputs * (2 if spec.bias else 1) + spec.inputs * bits
    read = 4 * (rows * spec.inputs + panels * groups * PANEL + vectors)
    finish = OpCount.of(mul=out, add=out if spec.bias else 0, read=read, written=4 * out)
    return products + finish
