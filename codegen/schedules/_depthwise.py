"""Depthwise convolutions channels last: tiles of output columns x one vector of channels.

A tile goes through all channels before the next one, so all tensors are read and written in the
order in which they lie in memory.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from codegen.kernels.conv import ConvShape
from codegen.kernels.folds import all_lanes, put, whole
from codegen.kernels.tiles import scratch
from codegen.schedules._common import threads
from codegen.schedules._conv_window import Window
from codegen.schedules._tail import TailOf
from codegen.target import Target

# Columns of a tile at most: enough sums to hide the latency of a multiply-add.
_COLUMNS = 8


class Depthwise:
    """One kernel while it is written: x [N, H, W, C], w [KH, KW, C], out [N, OH, OW, C]."""

    def __init__(self, shape: ConvShape, target: Target, x: Any, w: Any, out: Any) -> None:
        self.lanes, self.workers = target.lanes, threads(target)
        self.x, self.w, self.out = x, w, out
        _, height, width, self.channels = (int(n) for n in x.shape)
        kh, kw, _ = (int(n) for n in w.shape)
        self.batch, self.high, wide, _ = (int(n) for n in out.shape)
        columns = -(-wide // -(-wide // _COLUMNS))
        self.window = Window(shape, (height, width), (kh, kw), wide, columns)

    def write(self, tail: TailOf) -> None:
        """Emit all of it; `tail(value, index)` is what is stored for a sum."""
        rows = self.batch * self.high
        parts = self._parts(rows)
        with T.parallel(0, parts * rows) as task:
            part, row = task // rows, task % rows
            n, i = row // self.high, row % self.high
            for first, number, size, edge in self.window.tiles():
                with T.serial(0, number) as t:
                    j0 = first if edge else first + t * size
                    for c0, blocks, width in self._channels():
                        share = blocks // parts
                        with T.serial(0, share) as block:
                            c = c0 + (part * share + block) * width
                            self._tile(n, i, j0, c, size, width, tail)

    def _parts(self, rows: int) -> int:
        """Into how many parts the channels are cut, so that threads share the work evenly."""
        vectors = self.channels // self.lanes if self.channels % self.lanes == 0 else 1
        parts = [p for p in range(1, self.workers + 1) if vectors % p == 0]
        return min(parts, key=lambda p: -(-rows * p // self.workers) / p)

    def _channels(self) -> list[tuple[int, int, int]]:
        """(first channel, number of vectors, lanes of one), down to single channels."""
        found, at, width = [], 0, self.lanes
        while at < self.channels:
            number = (self.channels - at) // width
            if number:
                found.append((at, number, width))
            at, width = at + number * width, width // 2
        return found

    def _tile(self, n: Any, i: Any, j0: Any, c: Any, size: int, width: int, tail: TailOf) -> None:
        sums = [scratch(width) for _ in range(size)]
        for held in sums:
            put(held, all_lanes(0.0, width), lanes=width)
        begin, end = self.window.taps(i)
        with T.serial(begin, end) as dy:
            y = self.window.row(i, dy)
            for dx in range(self.window.kw):
                tap = whole(self.w, dy, dx, lanes=width, start=c)
                for j, held in enumerate(sums):
                    column = self.window.column(j0 + j, dx)
                    if column is not None:
                        value = whole(self.x, n, y, column, lanes=width, start=c)
                        put(held, whole(held, lanes=width) + value * tap, lanes=width)
        # By way of memory, so that the code of what follows is there once a tile.
        done = scratch(size, width)
        for j, held in enumerate(sums):
            put(done, whole(held, lanes=width), j, lanes=width)
        with T.serial(0, size) as j, T.vectorized(0, width) as lane:
            index = [n, i, j0 + j, c + lane]
            T.buffer_store(self.out, tail(done[j, lane], index), index)
