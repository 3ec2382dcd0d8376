"""exp, erf and tanh as plain arithmetic, so that LLVM vectorises them (its own calls stay scalar).

All take and return one scalar float32 expression (use them inside `te.compute`), keep NaN, and
use only +, *, /, comparisons, rounding and bit casts. Clamps are written `Select(x < c, c, x)`:
this keeps a NaN, where tirx.max and tirx.min drop it, and is still one vector instruction.

Coefficients: exp after Cephes `expf`; erf and tanh are the odd rational fits used by Eigen.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

# Below it the result would be subnormal and is flushed to zero; above it float32 overflows.
EXP_LOW, EXP_HIGH = -87.33654, 88.72283
_LN2 = 0.6931471805599453
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
# Least relative error (9.2e-8) on |x| <= ln(2)/2 with the value 1 at 0.
_EXP5 = (
    8.29027210525289e-3,
    4.1898159621957115e-2,
    1.6667638127355505e-1,
    4.9999147841093144e-1,
    9.9999970631332e-1,
    1.0,
)
# The same powers of two: |x| <= 1/2, in base 2.
_EXP2 = tuple(c * _LN2 ** (5 - n) for n, c in enumerate(_EXP5))
_SHIFT = (
    12582912.0 + 127.0
)  # 1.5 * 2^23 + 127: adding it rounds, and leaves n + 127 in the low bits
_ERF_NUM = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_DEN = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
_TANH_NUM = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_DEN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def f32(value: float) -> Any:
    """A float32 constant expression."""
    return tirx.const(value, "float32")


def at_least(x: Any, low: float) -> Any:
    """max(x, low) that keeps a NaN of `x`."""
    return tirx.Select(x < f32(low), f32(low), x)


def at_most(x: Any, high: float) -> Any:
    """min(x, high) that keeps a NaN of `x`."""
    return tirx.Select(x > f32(high), f32(high), x)


def horner(x: Any, coefficients: tuple[float, ...], lanes: int = 1) -> Any:
    """The polynomial in x (of so many lanes) with these coefficients, the highest power first."""
    first, *others = (f32(c) if lanes == 1 else tirx.Broadcast(f32(c), lanes) for c in coefficients)
    y = first
    for c in others:
        y = y * x + c
    return y


def _exp_parts(x: Any) -> tuple[Any, Any]:
    """(e^r, n) with x = n ln 2 + r, |r| <= ln(2)/2; n an int32 expression."""
    n = tirx.nearbyint(x * f32(_LOG2E))
    r = x - n * f32(_LN2_HIGH) - n * f32(_LN2_LOW)
    return horner(r, _EXP) * r * r + r + f32(1.0), tirx.Cast("int32", n)


def _two_to(n: Any, bias: int) -> Any:
    shifted = (n + tirx.const(bias, "int32")) << tirx.const(23, "int32")
    return tirx.reinterpret("float32", shifted)


def vexp(x: Any) -> Any:
    """e^x; relative error below 2e-7; 0 below -87.33654 (2^-126), +inf from 88.72284; NaN kept."""
    y, n = _exp_parts(at_most(at_least(x, EXP_LOW), EXP_HIGH))
    # Two factors: 2^128 is not a float32, and n reaches it just below the overflow.
    half = n >> tirx.const(1, "int32")
    y = y * _two_to(half, 127) * _two_to(n - half, 127)
    y = tirx.Select(x < f32(EXP_LOW), f32(0.0), y)
    return tirx.Select(x > f32(EXP_HIGH), f32(float("inf")), y)


def vexp_nonpositive(x: Any) -> Any:
    """e^x for x <= 0 (the softmax case), as accurate as `vexp` with less work; 0 below -87.69."""
    y, n = _exp_parts(at_least(x, -88.0))  # -88 gives n = -127, whose power has all bits zero
    return y * _two_to(n, 127)


def vexp_weight(x: Any) -> Any:
    """e^x for x <= 0 as a weight beside one of 1; 0 below -87.69; NaN kept.

    The error is below 2e-7 of the result plus 1e-8 of 1: enough for the terms of a softmax, whose
    largest is 1. Twelve vector instructions, a third less than `vexp_nonpositive`.
    """
    c = at_least(x, -88.0)
    # As an integer in between, or TVM's simplifier would cancel adding and subtracting the shift.
    t = tirx.reinterpret("int32", c * f32(_LOG2E) + f32(_SHIFT))
    r = c - (tirx.reinterpret("float32", t) - f32(_SHIFT)) * f32(_LN2)
    bits = t << tirx.const(23, "int32")
    return horner(r, _EXP5) * tirx.reinterpret("float32", bits)


def vexp2_weight(x: Any) -> Any:
    """2^x for |x| <= 127, relative error below 2e-7; 0 from -127 down (-inf too); NaN kept.

    For weights whose largest is not known to be 1: rounding to n leaves an exact rest, so the
    error does not grow with |x|. Eleven vector instructions, six of them multiply-adds.
    """
    c = at_least(x, -127.0)
    t = tirx.reinterpret("int32", c + f32(_SHIFT))
    r = c - (tirx.reinterpret("float32", t) - f32(_SHIFT))
    bits = t << tirx.const(23, "int32")
    return horner(r, _EXP2) * tirx.reinterpret("float32", bits)


def verf(x: Any) -> Any:
    """erf(x); relative error below 5e-7; |x| > 4 gives +-1; NaN kept."""
    c = at_most(at_least(x, -4.0), 4.0)
    s = c * c
    return c * horner(s, _ERF_NUM) / horner(s, _ERF_DEN)


def vtanh(x: Any) -> Any:
    """tanh(x); relative error below 5e-7; |x| > 9 gives +-1; NaN kept."""
    c = at_most(at_least(x, -9.0), 9.0)
    s = c * c
    return c * horner(s, _TANH_NUM) / horner(s, _TANH_DEN)
