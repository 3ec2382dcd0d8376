"""Depthwise convolutions channels last, written for tiles of output columns x a vector of channels.

Taps that fall on the padding are left out: rows by the bounds of a loop, columns by code of its
own for the tiles at the edges. So nothing is padded in memory, and all tensors are read and
written in the order in which they lie there.
"""

from __future__ import annotations

from typing import Any

import tvm.s_tir
from tvm.tirx.script.builder import ir as T

from codegen.kernels.conv import GEOMETRY, ConvShape
from codegen.kernels.folds import all_lanes, put, whole
from codegen.kernels.tiles import build, imax, imin, scratch
from codegen.schedules._common import Blocks, threads
from codegen.schedules._tail import Tail, TailOf, plain, position
from codegen.target import Target

# Columns of a tile at most: enough sums to hide the latency of a multiply-add.
_COLUMNS = 8


class _Depthwise:
    """One kernel while it is written: x [N, H, W, C], w [KH, KW, C], out [N, OH, OW, C]."""

    def __init__(self, shape: ConvShape, target: Target, x: Any, w: Any, out: Any) -> None:
        self.shape, self.lanes, self.workers = shape, target.lanes, threads(target)
        self.x, self.w, self.out = x, w, out
        _, self.height, self.width, self.channels = (int(n) for n in x.shape)
        self.kh, self.kw, _ = (int(n) for n in w.shape)
        self.batch, self.high, self.wide, _ = (int(n) for n in out.shape)
        self.columns = -(-self.wide // -(-self.wide // _COLUMNS))

    def write(self, tail: TailOf) -> None:
        """Emit all of it; `tail(value, index)` is what is stored for a sum."""
        rows = self.batch * self.high
        parts = self._parts(rows)
        with T.parallel(0, parts * rows) as task:
            part, row = task // rows, task % rows
            n, i = row // self.high, row % self.high
            for first, number, static in self._tiles():
                size = min(self.columns, self.wide - first)
                with T.serial(0, number) as t:
                    j0 = first + t * self.columns
                    for c0, blocks, width in self._channels():
                        share = blocks // parts
                        with T.serial(0, share) as block:
                            c = c0 + (part * share + block) * width
                            self._tile(n, i, first if static else j0, c, size, width, tail)

    def _parts(self, rows: int) -> int:
        """Into how many parts of the channels a row is cut, so that threads share evenly."""
        whole_blocks = self.channels // self.lanes if self.channels % self.lanes == 0 else 1
        parts = [p for p in range(1, self.workers + 1) if whole_blocks % p == 0]

        def busiest(p: int) -> float:
            return -(-rows * p // self.workers) / p

        return min(parts, key=busiest)

    def _channels(self) -> list[tuple[int, int, int]]:
        """(first channel, number of vectors, lanes of one), down to single channels."""
        found, at, width = [], 0, self.lanes
        while at < self.channels:
            number = (self.channels - at) // width
            if number:
                found.append((at, number, width))
            at, width = at + number * width, width // 2
        return found

    def _tiles(self) -> list[tuple[int, int, bool]]:
        """(first column, number of tiles, whether some tap falls on the padding) in order."""
        left, step = self.shape.padding[1], self.shape.stride[1]
        reach = (self.kw - 1) * self.shape.dilation[1] - left
        found: list[tuple[int, int, bool]] = []
        for j in range(0, self.wide, self.columns):
            size = min(self.columns, self.wide - j)
            inside = j * step >= left and (j + size - 1) * step + reach < self.width
            if inside and size == self.columns and found and not found[-1][2]:
                found[-1] = (found[-1][0], found[-1][1] + 1, False)
            else:
                found.append((j, 1, not inside))
        return found

    def _tile(self, n: Any, i: Any, j0: Any, c: Any, size: int, width: int, tail: TailOf) -> None:
        """Columns j0, j0 + 1, ... of row i; j0 is a number where taps fall on the padding."""
        (sy, sx), (ey, ex) = self.shape.stride, self.shape.dilation
        top, left, _, _ = self.shape.padding
        sums = [scratch(width) for _ in range(size)]
        for held in sums:
            put(held, all_lanes(0.0, width), lanes=width)
        # The first tap whose row is not above the image, and the first one below it.
        begin = imax((top - i * sy + ey - 1) // ey, 0) if top else 0
        end = imin((self.height - 1 + top - i * sy) // ey + 1, self.kh)
        with T.serial(begin, end) as dy:
            y = i * sy + dy * ey - top
            for dx in range(self.kw):
                tap = whole(self.w, dy, dx, lanes=width, start=c)
                for j, held in enumerate(sums):
                    column = (j0 + j) * sx + dx * ex - left
                    if isinstance(column, int) and not 0 <= column < self.width:
                        continue
                    value = whole(self.x, n, y, column, lanes=width, start=c)
                    put(held, whole(held, lanes=width) + value * tap, lanes=width)
        # By way of memory, so that the code of what follows is there once a tile.
        done = scratch(size, width)
        for j, held in enumerate(sums):
            put(done, whole(held, lanes=width), j, lanes=width)
        with T.serial(0, size) as j, T.vectorized(0, width) as lane:
            index = [n, i, j0 + j, c + lane]
            T.buffer_store(self.out, tail(done[j, lane], index), index)


def depthwise(func: Any, blocks: Blocks, target: Target) -> Any:
    """The kernel of `func`: its block ``depthwise`` and what was fused behind it."""
    sch, after = blocks.sch, blocks.after("depthwise")
    for block in after[:-1]:
        sch.compute_inline(block)
    product = sch.get(blocks.named("depthwise"))
    shape = ConvShape.loads(str(product.annotations[GEOMETRY]))
    image, weight = (r.source for r in product.reads)
    if "conv_pad" in blocks.names:
        image = sch.get(blocks.named("conv_pad")).reads[0].source
    params, result = blocks.params, product.writes[0].source
    x, w = position(image, params), position(weight, params)

    def body(*args: Any) -> None:
        tail = Tail(sch.get(after[-1]), result, params, list(args)) if after else plain
        _Depthwise(shape, target, args[x], args[w], args[-1]).write(tail)

    return tvm.s_tir.Schedule(build(func, body))
