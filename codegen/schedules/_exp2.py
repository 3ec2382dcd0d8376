"""Two to the power of a vector, in place, by what the target has for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.vector_math import f32, horner, vexp2_weight
from codegen.target import Target

_LANES = 16  # of AVX-512
_REDUCE = "llvm.x86.avx512.mask.reduce.ps.512"
_SCALE = "llvm.x86.avx512.mask.scalef.ps.512"
_FLOOR = 9  # of vreduceps: what is left above the next whole number below; no exceptions
# 2^r for 0 <= r < 1, relative error 9.2e-8 (1.5e-7 as float32 computes it), 1 at 0.
_EXP2 = (
    1.867131477954311e-3,
    9.017024660255219e-3,
    5.5799920424658964e-2,
    2.4016444655288885e-1,
    6.9315131236525e-1,
    1.0,
)


def power_of_two(target: Target) -> Callable[[Any, Any], None]:
    """A function (buffer, i): row i of a float32 buffer [rows, lanes] to 2^row, in place.

    Relative error below 2e-7 for |x| <= 126; 0 for -inf, NaN kept. Below -126 a result is
    subnormal (AVX-512) or, from -127 down, 0.
    """
    if target.lanes == _LANES and "avx512dq" in target.features:
        return _by_scale

    def plain(buffer: Any, i: Any) -> None:
        with T.vectorized(0, target.lanes) as x:
            T.buffer_store(buffer, vexp2_weight(buffer[i, x]), [i, x])

    return plain


def _by_scale(buffer: Any, i: Any) -> None:
    """Seven instructions, five of them multiply-adds; the plain way has eleven."""
    x = buffer.vload([i, 0], f"float32x{_LANES}")
    rest = _masked(_REDUCE, x, tirx.const(_FLOOR, "int32"))
    power = _masked(_SCALE, horner(rest, _EXP2, _LANES), x)
    T.buffer_store(buffer, power, [i, tirx.Ramp(0, 1, _LANES)])


def _masked(name: str, *args: Any) -> Any:
    """An AVX-512 intrinsic on all lanes, rounding as the processor is set to."""
    rest = (tirx.Broadcast(f32(0.0), _LANES), tirx.const(-1, "int16"), tirx.const(4, "int32"))
    return tirx.call_llvm_pure_intrin(f"float32x{_LANES}", name, *args, *rest)
