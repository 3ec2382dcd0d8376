"""Convolutions in NCHW with weights as they are.

Block names: ``conv_pad`` (zero padding), ``grouped_conv`` (the sums). CPU targets run all but
grouped ones channels last (codegen/kernels/conv_last.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from tvm import te, tirx

# Attribute of a block that says how a convolution moves over its image: it survives fusion.
GEOMETRY = "rewriter.conv"


@dataclass(frozen=True)
class ConvShape:
    """Strides, zero padding (top, left, bottom, right) and dilation of a 2-D convolution.

    `first`: the image is [N, C, H, W] though the result is channels last.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    first: bool = False

    def output(self, height: int, width: int, kh: int, kw: int) -> tuple[int, int]:
        """Height and width of the result."""
        top, left, bottom, right = self.padding
        high = height + top + bottom - self.dilation[0] * (kh - 1) - 1
        wide = width + left + right - self.dilation[1] * (kw - 1) - 1
        return high // self.stride[0] + 1, wide // self.stride[1] + 1

    def dumps(self) -> str:
        """As JSON, for the attribute `GEOMETRY` of a block."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> ConvShape:
        """Inverse of `dumps`."""
        known = json.loads(text)
        stride, padding, dilation = (tuple(known[k]) for k in ("stride", "padding", "dilation"))
        return cls(stride, padding, dilation, bool(known["first"]))


def grouped_conv2d(x: Any, weight: Any, groups: int, shape: ConvShape) -> Any:
    """x [N, I, H, W], weight [O, I / groups, KH, KW] as it is -> [N, O, OH, OW].

    With one channel per group this is the depthwise convolution.
    """
    n, _, height, width = (int(d) for d in x.shape)
    out, inner, kh, kw = (int(d) for d in weight.shape)
    high, wide = shape.output(height, width, kh, kw)
    source, per_group = padded(x, shape), out // groups
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


def padded(x: Any, shape: ConvShape) -> Any:
    """x [N, C, H, W] in the zeros around it (block ``conv_pad``); x itself without padding."""
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
