"""Convolutions with packed weights: register tiles of output columns x a panel of channels."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.conv import ConvShape
from codegen.kernels.dense import row_tile
from codegen.kernels.folds import all_lanes, put, whole
from codegen.kernels.tiles import scratch
from codegen.schedules._common import chunk_cost
from codegen.schedules._conv_window import Window
from codegen.schedules._tail import TailOf
from codegen.target import Target


class Conv2d:
    """One kernel while it is written: x [N, H, W, C], out [N, OH, OW, O].

    w [panels, KH, KW, C, channels of a panel]. With `shape.first` x is [N, C, H, W].
    """

    def __init__(self, shape: ConvShape, target: Target, x: Any, w: Any, out: Any) -> None:
        self.target, self.lanes, self.first = target, target.lanes, shape.first
        self.x, self.w, self.out = x, w, out
        self.panels, kh, kw, self.inner, panel = (int(n) for n in w.shape)
        self.vectors = panel // self.lanes
        self.batch, self.high, wide, self.outer = (int(n) for n in out.shape)
        height, width = (int(n) for n in (x.shape[2:4] if shape.first else x.shape[1:3]))
        self.window = Window(shape, (height, width), (kh, kw), wide, row_tile(wide, target))

    def write(self, tail: TailOf) -> None:
        """Emit all of it; `tail(value, index)` is what is stored for a sum."""
        rows = self.batch * self.high
        by_panels = chunk_cost([self.panels], self.target) < chunk_cost([rows], self.target)
        outer, inner = (self.panels, rows) if by_panels else (rows, self.panels)
        with T.parallel(0, outer) as a, T.serial(0, inner) as b:
            panel, row = (a, b) if by_panels else (b, a)
            n, i = row // self.high, row % self.high
            for first, number, size, edge in self.window.tiles():
                with T.serial(0, number) as t:
                    self._tile(n, i, first if edge else first + t * size, panel, size, tail)

    def _tile(self, n: Any, i: Any, j0: Any, panel: Any, size: int, tail: TailOf) -> None:
        sums = [[scratch(self.lanes) for _ in range(self.vectors)] for _ in range(size)]
        for held in (held for row in sums for held in row):
            put(held, all_lanes(0.0, self.lanes), lanes=self.lanes)
        begin, end = self.window.taps(i)
        with T.serial(begin, end) as dy:
            y = self.window.row(i, dy)
            if self.first:
                with T.serial(0, self.inner) as c:
                    for dx in range(self.window.kw):
                        self._step(sums, n, y, j0, (panel, dy, dx, c))
            elif isinstance(j0, int) or self.window.shape.dilation[1] > 1:
                for dx in range(self.window.kw):
                    with T.serial(0, self.inner) as c:
                        self._step(sums, n, y, j0, (panel, dy, dx, c))
            else:  # columns and channels of a row of taps lie one behind the other
                with T.serial(0, self.window.kw * self.inner) as k:
                    self._step(sums, n, y, j0, (panel, dy, k // self.inner, k % self.inner))
        self._store(sums, n, i, j0, panel, tail)

    def _step(self, sums: Any, n: Any, y: Any, j0: Any, at: tuple[Any, ...]) -> None:
        _, _, dx, c = at
        weights = [
            whole(self.w, *at, lanes=self.lanes, start=v * self.lanes) for v in range(self.vectors)
        ]
        for j, row in enumerate(sums):
            column = self.window.column(j0 + j, dx)
            if column is None:
                continue
            value = self.x[n, c, y, column] if self.first else self.x[n, y, column, c]
            value = tirx.Broadcast(value, self.lanes) if self.lanes > 1 else value
            for held, weight in zip(row, weights, strict=True):
                put(held, whole(held, lanes=self.lanes) + value * weight, lanes=self.lanes)

    def _store(self, sums: Any, n: Any, i: Any, j0: Any, panel: Any, tail: TailOf) -> None:
        for v in range(self.vectors):
            # By way of memory, so that the code of what follows is there once a vector.
            done = scratch(len(sums), self.lanes)
            for j, row in enumerate(sums):
                put(done, whole(row[v], lanes=self.lanes), j, lanes=self.lanes)
            self._put(done, [n, i, j0], (panel * self.vectors + v) * self.lanes, tail)

    def _put(self, done: Any, at: list[Any], first: Any, tail: TailOf) -> None:
        """Store what is there of a vector of channels from `first` on."""
        n, i, j0 = at

        def one(j: Any, lane: Any) -> None:
            index = [n, i, j0 + j, first + lane]
            T.buffer_store(self.out, tail(done[j, lane], index), index)

        columns, rest = int(done.shape[0]), self.outer % self.lanes
        with (
            T.If(first + self.lanes <= self.outer),
            T.Then(),
            T.serial(0, columns) as j,
            T.vectorized(0, self.lanes) as lane,
        ):
            one(j, lane)
        if rest:
            partly = tirx.all(first < self.outer, first + self.lanes > self.outer)
            with T.If(partly), T.Then(), T.serial(0, columns) as j, T.serial(0, rest) as lane:
                one(j, lane)
