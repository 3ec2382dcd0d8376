"""Convolutions with the channels last: [N, H, W, C], so every access runs along channels.

Block names: ``conv_pad`` (zero padding), ``conv`` and ``depthwise`` (the sums).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import te, tirx

from codegen.kernels.conv import GEOMETRY, ConvShape, padded


def pack_conv(weight: NDArray[Any], width: int) -> NDArray[Any]:
    """`weight` [O, I, KH, KW] as [ceil(O / width), KH, KW, I, width], zeros where O ends."""
    out = weight.shape[0]
    panels = -(-out // width)
    padded = np.zeros((panels * width, *weight.shape[1:]), weight.dtype)
    padded[:out] = weight
    split = padded.reshape(panels, width, *weight.shape[1:])
    return np.ascontiguousarray(split.transpose(0, 3, 4, 2, 1))


def conv2d(x: Any, packed: Any, channels: int, shape: ConvShape) -> Any:
    """x [N, H, W, I] (`shape.first`: [N, I, H, W]), packed weights -> [N, OH, OW, channels]."""
    n, kh, kw, inner, nt = int(x.shape[0]), *(int(d) for d in packed.shape[1:])
    height, width = (int(d) for d in (x.shape[2:4] if shape.first else x.shape[1:3]))
    high, wide = shape.output(height, width, kh, kw)
    source = padded(x, shape) if shape.first else _padded(x, shape)
    dy, dx = te.reduce_axis((0, kh), name="dy"), te.reduce_axis((0, kw), name="dx")
    c = te.reduce_axis((0, inner), name="c")
    (sy, sx), (ey, ex) = shape.stride, shape.dilation

    def image(b: Any, i: Any, j: Any, c: Any) -> Any:
        return source[b, c, i, j] if shape.first else source[b, i, j, c]

    return te.compute(
        (n, high, wide, channels),
        lambda b, i, j, o: te.sum(
            image(b, i * sy + dy * ey, j * sx + dx * ex, c) * packed[o // nt, dy, dx, c, o % nt],
            axis=[dy, dx, c],
        ),
        name="conv",
        attrs={GEOMETRY: shape.dumps()},
    )


def depthwise(x: Any, weight: Any, shape: ConvShape) -> Any:
    """x [N, H, W, C], weight [KH, KW, C] -> [N, OH, OW, C]."""
    n, height, width, channels = (int(d) for d in x.shape)
    kh, kw, _ = (int(d) for d in weight.shape)
    high, wide = shape.output(height, width, kh, kw)
    source = _padded(x, shape)
    dy, dx = te.reduce_axis((0, kh), name="dy"), te.reduce_axis((0, kw), name="dx")
    (sy, sx), (ey, ex) = shape.stride, shape.dilation
    return te.compute(
        (n, high, wide, channels),
        lambda b, i, j, c: te.sum(
            source[b, i * sy + dy * ey, j * sx + dx * ex, c] * weight[dy, dx, c], axis=[dy, dx]
        ),
        name="depthwise",
        attrs={GEOMETRY: shape.dumps()},
    )


def _padded(x: Any, shape: ConvShape) -> Any:
    top, left, bottom, right = shape.padding
    if not any(shape.padding):
        return x
    n, height, width, channels = (int(d) for d in x.shape)
    zero = tirx.const(0, x.dtype)

    def value(b: Any, i: Any, j: Any, c: Any) -> Any:
        inside = tirx.all(i >= top, i < top + height, j >= left, j < left + width)
        return tirx.if_then_else(inside, x[b, i - top, j - left, c], zero)

    return te.compute(
        (n, height + top + bottom, width + left + right, channels), value, name="conv_pad"
    )
