"""Convolutions in NCHW with packed weights.

Block names: ``conv_pad`` (zero padding), ``conv`` (the sums), ``conv_out`` (back to NCHW).
A general convolution keeps `nt` output channels in vector registers, so weights are packed
[O / nt, I, KH, KW, nt] at compile time; a depthwise one runs along the output row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import te, tirx

from codegen.kernels.dense import row_tile
from codegen.target import Target


@dataclass(frozen=True)
class ConvShape:
    """Strides, zero padding (top, left, bottom, right) and dilation of a 2-D convolution."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output(self, height: int, width: int, kh: int, kw: int) -> tuple[int, int]:
        """Height and width of the result."""
        top, left, bottom, right = self.padding
        high = height + top + bottom - self.dilation[0] * (kh - 1) - 1
        wide = width + left + right - self.dilation[1] * (kw - 1) - 1
        return high // self.stride[0] + 1, wide // self.stride[1] + 1


def pack_conv(weight: NDArray[Any], lanes: int) -> NDArray[Any]:
    """`weight` [O, I, KH, KW] as [ceil(O / lanes), I, KH, KW, lanes], zeros where O ends."""
    out = weight.shape[0]
    blocks = -(-out // lanes)
    padded = np.zeros((blocks * lanes, *weight.shape[1:]), weight.dtype)
    padded[:out] = weight
    return np.ascontiguousarray(
        padded.reshape(blocks, lanes, *weight.shape[1:]).transpose(0, 2, 3, 4, 1)
    )


def conv2d(x: Any, packed: Any, channels: int, shape: ConvShape, target: Target) -> Any:
    """x [N, I, H, W] with packed weights -> [N, channels, OH, OW]."""
    n, inner, height, width = (int(d) for d in x.shape)
    blocks, _, kh, kw, lanes = (int(d) for d in packed.shape)
    high, wide = shape.output(height, width, kh, kw)
    tile = row_tile(wide, target)
    source = _padded(x, shape)
    c = te.reduce_axis((0, inner), name="c")
    dy, dx = te.reduce_axis((0, kh), name="dy"), te.reduce_axis((0, kw), name="dx")
    (sy, sx), (ey, ex) = shape.stride, shape.dilation

    def column(j: Any) -> Any:
        return tirx.min(j, wide - 1) if wide % tile else j

    product = te.compute(
        (n, blocks, high, -(-wide // tile) * tile, lanes),
        lambda b, o, i, j, v: te.sum(
            source[b, c, i * sy + dy * ey, column(j) * sx + dx * ex] * packed[o, c, dy, dx, v],
            axis=[c, dy, dx],
        ),
        name="conv",
    )
    return te.compute(
        (n, channels, high, wide),
        lambda b, o, i, j: product[b, o // lanes, i, j, o % lanes],
        name="conv_out",
    )


def grouped_conv2d(x: Any, weight: Any, groups: int, shape: ConvShape) -> Any:
    """x [N, I, H, W], weight [O, I / groups, KH, KW] as it is -> [N, O, OH, OW].

    With one channel per group this is the depthwise convolution.
    """
    n, _, height, width = (int(d) for d in x.shape)
    out, inner, kh, kw = (int(d) for d in weight.shape)
    high, wide = shape.output(height, width, kh, kw)
    source, per_group = _padded(x, shape), out // groups
    c = te.reduce_axis((0, inner), name="c")
    dy, dx = te.reduce_axis((0, kh), name="dy"), te.reduce_axis((0, kw), name="dx")
    (sy, sx), (ey, ex) = shape.stride, shape.dilation
    return te.compute(
        (n, out, high, wide),
        lambda b, o, i, j: te.sum(
            source[b, (o // per_group) * inner + c, i * sy + dy * ey, j * sx + dx * ex]
            * weight[o, c, dy, dx],
            axis=[c, dy, dx],
        ),
        name="grouped_conv",
    )


def _padded(x: Any, shape: ConvShape) -> Any:
    top, left, bottom, right = shape.padding
    if not any(shape.padding):
        return x
    n, inner, height, width = (int(d) for d in x.shape)
    zero = tirx.const(0, x.dtype)

    def value(b: Any, c: Any, i: Any, j: Any) -> Any:
        inside = tirx.all(i >= top, i < top + height, j >= left, j < left + width)
        return tirx.if_then_else(inside, x[b, c, i - top, j - left], zero)

    return te.compute(
        (n, inner, height + top + bottom, width + left + right), value, name="conv_pad"
    )
