"""How the kernels of convolutions move over an image without a padded copy of it.

Taps that fall on the padding are left out: rows by the bounds of a loop, columns by code of its
own for the tiles of output columns at the edges.
"""

from __future__ import annotations

from typing import Any

from codegen.kernels.conv import ConvShape
from codegen.kernels.tiles import imax, imin


class Window:
    """Rows and columns of an image [height, width] under a kernel [kh, kw].

    Columns of the result, `wide` in all, go in tiles of `columns`.
    """

    def __init__(
        self,
        shape: ConvShape,
        image: tuple[int, int],
        kernel: tuple[int, int],
        wide: int,
        columns: int,
    ) -> None:
        self.shape, self.wide, self.columns = shape, wide, columns
        self.height, self.width = image
        self.kh, self.kw = kernel

    def tiles(self) -> list[tuple[int, int, int, bool]]:
        """(first column, number of tiles, columns of a tile, whether at an edge) in order.

        At an edge some tap falls on the padding; such a tile stands alone.
        """
        left, step = self.shape.padding[1], self.shape.stride[1]
        reach = (self.kw - 1) * self.shape.dilation[1] - left
        found: list[tuple[int, int, int, bool]] = []
        for j in range(0, self.wide, self.columns):
            size = min(self.columns, self.wide - j)
            edge = j * step < left or (j + size - 1) * step + reach >= self.width
            if found and (edge, size) == (False, found[-1][2]) and not found[-1][3]:
                found[-1] = (found[-1][0], found[-1][1] + 1, size, False)
            else:
                found.append((j, 1, size, edge))
        return found

    def taps(self, i: Any) -> tuple[Any, Any]:
        """The first tap of row i that is not above the image, and the first one below it."""
        top, step, apart = self.shape.padding[0], self.shape.stride[0], self.shape.dilation[0]
        begin = imax((top - i * step + apart - 1) // apart, 0) if top else 0
        return begin, imin((self.height - 1 + top - i * step) // apart + 1, self.kh)

    def row(self, i: Any, dy: Any) -> Any:
        """Row of the image under tap dy for row i of the result."""
        return i * self.shape.stride[0] + dy * self.shape.dilation[0] - self.shape.padding[0]

    def column(self, j: Any, dx: Any) -> Any:
        """Column of the image under tap dx for column j; None where j is a number and it is out."""
        column = j * self.shape.stride[1] + dx * self.shape.dilation[1] - self.shape.padding[1]
        outside = isinstance(column, int) and not 0 <= column < self.width
        return None if outside else column
