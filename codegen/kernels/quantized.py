"""Matrix products in int8 and bfloat16: definitions, packing of weights, conversion of rows.

int8: weights are symmetric by output channel (w = ws[n] * wq), rows of x by their own range
(x = s * (q - z), q unsigned), so x w = s * ws[n] * (sum q wq - z * sum wq), summed in int32.
bfloat16 values are kept as their bits in uint16, because TVM's legalisation would widen them;
products are summed in float32. The depth is padded with zeros to whole groups: 4 for int8, 2 for
bfloat16, which is what one lane of the processor's dot products takes.
Block names: ``dense_int8`` and ``dense_bf16`` (the product), ``dense_out`` (back to float32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import te, tirx

from codegen.kernels.attention import attributes
from codegen.kernels.dense import dense_made, panel_width, row_tile
from codegen.kernels.rows import NAN_MAX, NAN_MIN
from codegen.kernels.vector_math import f32
from codegen.target import Target

GROUP = {"int8": 4, "bf16": 2}
QUANTIZE = "quantize_rows"
# 1.5 * 2^23: adding it rounds to a whole number, which is then in the low bits.
_SHIFT, _SHIFT_BITS = 12582912.0, 0x4B400000
# The largest depth whose sum of products can not leave int32.
DEEPEST = (2**31 - 1) // (2 * 255 * 127)


def padded(depth: int, precision: str) -> int:
    """`depth` in whole groups."""
    group = GROUP[precision]
    return -(-depth // group) * group


def bf16_bits(array: NDArray[Any]) -> NDArray[Any]:
    """float32 as the bits of the nearest bfloat16 (ties to even), uint16; NaN stays NaN."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(array), (bits >> 16) | 0x40, rounded)
    result: NDArray[Any] = rounded.astype(np.uint16)
    return result


def quantize_weight(weight: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(int8 [N, K] in -127..127, scale float32 [N]) of a weight [N, K]."""
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    safe = np.where(scale > 0, scale, 1).astype(np.float32)
    return np.rint(weight / safe[:, None]).astype(np.int8), scale.astype(np.float32)


def pack_groups(weight: NDArray[Any], width: int, precision: str) -> NDArray[Any]:
    """[N, K] as panels [ceil(N / width), ceil(K / group), width, group], zeros at the ends."""
    n, k = weight.shape
    group, panels = GROUP[precision], -(-n // width)
    depth = padded(k, precision)
    whole = np.zeros((panels * width, depth), weight.dtype)
    whole[:n, :k] = weight
    return np.ascontiguousarray(
        whole.reshape(panels, width, depth // group, group).transpose(0, 2, 1, 3)
    )


def to_bf16(x: Any) -> Any:
    """x [..., K] float32 as bits of bfloat16 [..., K in whole pairs], uint16."""
    *lead, depth = (int(d) for d in x.shape)
    wide = padded(depth, "bf16")

    def value(*i: Any) -> Any:
        if wide == depth:
            return _bits(x(*i))
        return tirx.if_then_else(i[-1] < depth, _bits(x(*i)), tirx.const(0, "uint16"))

    return te.compute((*lead, wide), value, name="to_bf16")


def _bits(value: Any) -> Any:
    bits = tirx.reinterpret("uint32", value)

    def u32(number: int) -> Any:
        return tirx.const(number, "uint32")

    sixteen = u32(16)
    odd = (bits >> sixteen) & u32(1)
    rounded = (bits + u32(0x7FFF) + odd) >> sixteen
    lost = (bits & u32(0x7FFFFFFF)) > u32(0x7F800000)
    return tirx.Select(lost, (bits >> sixteen) | u32(0x40), rounded).astype("uint16")


def quantize_attributes() -> dict[str, Any]:
    """Attributes of the PrimFunc of `quantize_rows`."""
    return attributes(QUANTIZE)


def quantize_rows(x: Any) -> list[Any]:
    """x [..., K] -> q uint8 [..., K in whole groups], s float32 [...], z int32 [...].

    A row with a value that is not finite has a scale that is not finite.
    """
    *lead, depth = (int(d) for d in x.shape)
    wide = padded(depth, "int8")
    kl, kh = te.reduce_axis((0, depth), name="kl"), te.reduce_axis((0, depth), name="kh")
    low = te.compute(lead, lambda *i: NAN_MIN.reduce(x(*i, kl), axis=kl), name="quantize_low")
    high = te.compute(lead, lambda *i: NAN_MAX.reduce(x(*i, kh), axis=kh), name="quantize_high")
    scale = te.compute(lead, lambda *i: scale_of(low(*i), high(*i)), name="quantize_scale")
    zero = te.compute(lead, lambda *i: zero_of(low(*i), scale(*i)), name="quantize_zero")

    def value(*i: Any) -> Any:
        row = i[:-1]
        code = code_of(x(*i), inverse_of(scale(*row)), zero(*row).astype("float32"))
        if wide == depth:
            return code
        return tirx.if_then_else(i[-1] < depth, code, tirx.const(0, "uint8"))

    return [te.compute((*lead, wide), value, name="quantize"), scale, zero]


def scale_of(low: Any, high: Any) -> Any:
    """Step of 255 that spans `low` to `high` and zero."""
    low = tirx.Select(low > f32(0.0), f32(0.0), low)
    high = tirx.Select(high < f32(0.0), f32(0.0), high)
    return (high - low) * f32(1.0 / 255.0)


def inverse_of(scale: Any) -> Any:
    """1 / scale, 0 for a row of zeros."""
    return tirx.Select(scale > f32(1e-37), f32(1.0) / scale, f32(0.0))


def zero_of(low: Any, scale: Any) -> Any:
    """The code of 0.0, int32 in 0..255."""
    return _rounded(f32(0.0) - low * inverse_of(scale), f32(_SHIFT))


def code_of(x: Any, inverse: Any, zero: Any) -> Any:
    """The nearest code of `x`, uint8; `zero` is the code of 0.0 as float32."""
    return _rounded(x * inverse, zero + f32(_SHIFT)).astype("uint8")


def _rounded(x: Any, shift: Any) -> Any:
    """x + shift - _SHIFT rounded to int32 in 0..255, by the low bits of a float; any x will do."""
    code = tirx.reinterpret("int32", x + shift) - tirx.const(_SHIFT_BITS, "int32")
    return tirx.max(tirx.min(code, tirx.const(255, "int32")), tirx.const(0, "int32"))


def dense_int8(
    q: Any,
    scale: Any,
    zero: Any,
    panels: Any,
    weight_scale: Any,
    weight_sum: Any,
    columns: int,
    target: Target,
) -> Any:
    """Quantised rows times int8 panels -> float32 [.., T, columns]."""

    def factor(value: Any) -> Any:
        return value.astype("int32")

    product = _product(q, panels, columns, target, factor, "int8")

    def value(*i: Any) -> Any:
        row, n = i[:-1], i[-1]
        whole = product(*i) - zero(*row) * weight_sum[n]
        return whole.astype("float32") * (scale(*row) * weight_scale[n])

    return te.compute((*q.shape[:-1], columns), value, name="dense_out")


def dense_bf16(x: Any, panels: Any, columns: int, target: Target) -> Any:
    """Rows of bfloat16 bits times panels of them -> float32 [.., T, columns]."""

    product = _product(x, panels, columns, target, _wide, "bf16")
    rows = [int(d) for d in x.shape[:-1]]
    if [int(d) for d in product.shape] == [*rows, columns]:
        return product
    return te.compute((*rows, columns), lambda *i: product(*i), name="dense_out")


def dense_widened(x: Any, panels: Any, columns: int, target: Target) -> Any:
    """x [.., T, K] times panels [P, K, width] of bfloat16 bits, which the kernel widens.

    For processors on which the dot products of bfloat16 are slower than float32's.
    """
    count, depth, width = (int(d) for d in panels.shape)
    shape = (count, depth, width)
    return dense_made(x, shape, lambda p, k, j: _wide(panels[p, k, j]), columns, target)


def round_bf16(x: Any) -> Any:
    """float32 values rounded to what bfloat16 can hold."""
    return te.compute(x.shape, lambda *i: _wide(_bits(x(*i))), name="round_bf16")


def _wide(bits: Any) -> Any:
    return tirx.reinterpret("float32", bits.astype("uint32") << tirx.const(16, "uint32"))


def _product(
    x: Any,
    panels: Any,
    columns: int,
    target: Target,
    factor: Callable[[Any], Any],
    precision: str,
) -> Any:
    *lead, rows, depth = (int(d) for d in x.shape)
    nt, mt, group = panel_width(target), row_tile(rows, target), GROUP[precision]
    k = te.reduce_axis((0, depth), name="k")

    def row(r: Any) -> Any:
        return tirx.min(r, rows - 1) if rows % mt else r

    return te.compute(
        (*lead, -(-rows // mt) * mt, -(-columns // nt) * nt),
        lambda *i: te.sum(
            factor(x(*i[:-2], row(i[-2]), k))
            * factor(panels[i[-1] // nt, k // group, i[-1] % nt, k % group]),
            axis=k,
        ),
        name=f"dense_{precision}",
    )
