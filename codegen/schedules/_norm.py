"""Norms of some rows at a time, their sums folded over the lanes together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.folds import all_lanes, put, sums, whole
from codegen.kernels.tiles import scratch, vectors

# Rows whose sums are taken side by side: enough to hide the latency of an addition.
GROUP = 4


class RowNorm:
    """Layer norm (`centred`) or RMS norm of `height` rows of x [..., N], a power of two of them.

    `height` is at most `lanes`; gamma and beta are [N], beta None where there is none.
    """

    def __init__(
        self, x: Any, gamma: Any, beta: Any, *, centred: bool, eps: float, lanes: int, height: int
    ) -> None:
        self.x, self.gamma, self.beta = x, gamma, beta
        self.centred, self.eps = centred, eps
        self.width, self.lanes, self.height = int(x.shape[-1]), lanes, height

    def tile(
        self, index: Callable[[int], list[Any]], store: Callable[[int, Any, Any], None]
    ) -> None:
        """store(r, j, value) for all rows r < height; index(r): where row r is in x."""
        mean, inverse = scratch(self.height), scratch(self.height)
        scale = all_lanes(1.0 / self.width, self.height)
        if self.centred:
            self._put(mean, self._sums(index, lambda r, value: value) * scale)

        def square(r: int, value: Any) -> Any:
            value = self._minus(value, mean, r)
            return value * value

        variance = self._sums(index, square) * scale + all_lanes(self.eps, self.height)
        self._put(inverse, all_lanes(1.0, self.height) / tirx.sqrt(variance))
        for group in self._groups():
            rows = [index(r) for r in group]

            def one(j: Any, group: range = group, rows: list[Any] = rows) -> None:
                for r, row in zip(group, rows, strict=True):
                    value = self._minus(self.x[(*row, j)], mean, r) * inverse[r]
                    store(r, j, self._affine(value, j))

            vectors(self.width, self.lanes, one)

    def _groups(self) -> list[range]:
        step = min(GROUP, self.height)
        return [range(r, r + step) for r in range(0, self.height, step)]

    def _minus(self, value: Any, mean: Any, r: int) -> Any:
        return value - mean[r] if self.centred else value

    def _affine(self, value: Any, j: Any) -> Any:
        value = value * self.gamma[j]
        return value if self.beta is None else value + self.beta[j]

    def _put(self, buffer: Any, value: Any) -> None:
        put(buffer, value, lanes=self.height)

    def _sums(self, index: Callable[[int], list[Any]], value: Callable[[int, Any], Any]) -> Any:
        """The sums over each row r of value(r, x[r, j]), as one vector."""
        parts = []
        for group in self._groups():
            rows, held = [index(r) for r in group], [scratch(self.lanes) for _ in group]
            for part in held:
                put(part, all_lanes(0.0, self.lanes), lanes=self.lanes)

            def add(
                j: Any, lane: Any, rows: Any = rows, held: Any = held, r0: int = group[0]
            ) -> None:
                for n, (row, part) in enumerate(zip(rows, held, strict=True)):
                    found = part[lane] + value(r0 + n, self.x[(*row, j)])
                    T.buffer_store(part, found, [lane])

            blocks, rest = divmod(self.width, self.lanes)
            with T.serial(0, blocks) as k, T.vectorized(0, self.lanes) as lane:
                add(k * self.lanes + lane, lane)
            if rest:
                with T.serial(0, rest) as lane:
                    add(blocks * self.lanes + lane, lane)
            parts += [whole(part, lanes=self.lanes) for part in held]
        return sums(parts, self.lanes)
