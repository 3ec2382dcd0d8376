"""Activations from the vector approximations of codegen/kernels/vector_math.py.

All take one float32 expression, keep a NaN and are within 1e-6 (absolute) of float64 on [-10, 10].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from codegen.kernels.vector_math import at_least, at_most, f32, horner, verf, vexp, vtanh

_PHI_END = 3.95
_PHI = (
    2.4436074792803034e-08,
    -1.6811679952859614e-06,
    4.9552255424072026e-05,
    -0.0008290424830972623,
    0.00884293328729798,
    -0.0647227819345419,
    0.39798671584859674,
)


def vsigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return f32(1.0) / (f32(1.0) + vexp(f32(0.0) - x))


def gelu(x: Any) -> Any:
    """x * Phi(x), with erf."""
    return x * (f32(0.5) + f32(0.5) * verf(x * f32(0.7071067811865476)))


def gelu_coarse(x: Any) -> Any:
    """x * Phi(x) within 2e-4, for what is rounded to 8 bits or fewer next; half of `gelu`'s work.

    Phi - 1/2 is odd: x P(x^2) on |x| <= 3.95, where it reaches 1/2; P has the least absolute error
    of the product.
    """
    c = at_most(at_least(x, -_PHI_END), _PHI_END)
    return x * (f32(0.5) + c * horner(c * c, _PHI))


def gelu_tanh(x: Any) -> Any:
    """The tanh approximation of gelu."""
    inner = f32(0.7978845608028654) * (x + f32(0.044715) * x * x * x)
    return f32(0.5) * x * (f32(1.0) + vtanh(inner))


def silu(x: Any) -> Any:
    """x * sigmoid(x)."""
    return x * vsigmoid(x)


# Relax operator -> the scalar function that stands for it in float32.
SCALAR: dict[str, Callable[[Any], Any]] = {
    "relax.exp": vexp,
    "relax.erf": verf,
    "relax.tanh": vtanh,
    "relax.sigmoid": vsigmoid,
    "relax.nn.gelu": gelu,
    "relax.nn.gelu_tanh": gelu_tanh,
    "relax.nn.silu": silu,
}


def elementwise(fn: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    """The TE definition that applies `fn` to every element; float16 goes through float32."""

    def define(x: Any) -> Any:
        dtype = str(x.dtype)
        if dtype == "float32":
            return te.compute(x.shape, lambda *i: fn(x(*i)), name=name)
        return te.compute(
            x.shape, lambda *i: tirx.Cast(dtype, fn(tirx.Cast("float32", x(*i)))), name=name
        )

    return define
