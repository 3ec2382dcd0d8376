"""Activations from the vector approximations of codegen/kernels/vector_math.py.

All take one float32 expression, keep a NaN and are within 1e-6 (absolute) of float64 on [-10, 10].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from codegen.kernels.vector_math import f32, verf, vexp, vtanh


def vsigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return f32(1.0) / (f32(1.0) + vexp(f32(0.0) - x))


def gelu(x: Any) -> Any:
    """x * Phi(x), with erf."""
    return x * (f32(0.5) + f32(0.5) * verf(x * f32(0.7071067811865476)))


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
