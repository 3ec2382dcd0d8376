"""Matrix products against packed panels: x [..., T, K] times w, laid out [Np / nt, K, nt].

A panel holds `nt` columns of the weight, so the inner loop reads it front to back. Rows are
computed in tiles of `mt`; when T is no multiple of the tile, the rows of the last tile that do not
exist read the last row again (a clamped index outside the inner loop) and are not stored.
Block names: ``dense`` (the product), ``dense_panel`` (packing done inside the kernel),
``dense_out`` (drops the padding).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import te, tirx

from codegen.target import Target


def panel_width(target: Target) -> int:
    """Columns of a panel: two vector registers."""
    return 2 * target.lanes


def row_tile(rows: int, target: Target) -> int:
    """The tile height for `rows` rows that wastes least.

    Each tile costs its height (at least 4 rows: fewer do not hide the latency of the
    multiply-adds) and a constant for its start and end.
    """
    most = 8 if target.vector_registers >= 32 else 6
    return min(range(most, 0, -1), key=lambda t: -(-rows // t) * (max(t, 4) + 0.5))


def pack(weight: NDArray[Any], width: int) -> NDArray[Any]:
    """`weight` [N, K] as panels [ceil(N / width), K, width], zeros where N ends."""
    n, k = weight.shape
    panels = -(-n // width)
    padded = np.zeros((panels * width, k), weight.dtype)
    padded[:n] = weight
    return np.ascontiguousarray(padded.reshape(panels, width, k).transpose(0, 2, 1))


def dense(x: Any, panels: Any, columns: int, target: Target) -> Any:
    """x [T, K] or [B, T, K] times packed panels -> [.., T, columns]."""
    return _product(x, lambda b, p, k, j: panels[p, k, j], columns, panel_width(target), target)


def dense_unpacked(x: Any, weight: Any, target: Target) -> Any:
    """x [.., T, K] times the transpose of weight [N, K], packed panel by panel inside the kernel.

    For weights that another kernel reads as they are (tied embeddings), so that they are stored
    once.
    """
    columns, depth = (int(d) for d in weight.shape)
    nt = panel_width(target)
    shape = (-(-columns // nt), depth, nt)
    return dense_made(
        x,
        shape,
        lambda p, k, j: weight[_clamp(p * nt + j, columns, columns % nt), k],
        columns,
        target,
    )


def dense_made(
    x: Any, shape: tuple[int, int, int], element: Any, columns: int, target: Target
) -> Any:
    """x [.., T, K] times panels of `shape` made inside the kernel by element(p, k, j)."""
    panels = te.compute(shape, element, name="dense_panel")
    nt = panel_width(target)
    return _product(x, lambda b, p, k, j: panels[p, k, j], columns, nt, target)


def batch_matmul(x: Any, y: Any, target: Target) -> Any:
    """x [.., T, K] times y [.., K, N] -> [.., T, N]; leading axes of size one broadcast."""
    *lead_x, rows, depth = (int(d) for d in x.shape)
    *lead_y, _, columns = (int(d) for d in y.shape)
    rank = max(len(lead_x), len(lead_y))
    lead = tuple(max(a, b) for a, b in zip(_ones(lead_x, rank), _ones(lead_y, rank), strict=True))
    nt = panel_width(target)
    panels = te.compute(
        (*lead_y, -(-columns // nt), depth, nt),
        lambda *i: y(*i[:-3], i[-2], _clamp(i[-3] * nt + i[-1], columns, columns % nt)),
        name="dense_panel",
    )
    return _tiles(
        lead,
        rows,
        depth,
        columns,
        lambda b, r, k: x(*_broadcast(b, lead_x), r, k),
        lambda b, p, k, j: panels(*_broadcast(b, lead_y), p, k, j),
        nt,
        target,
    )


def _product(x: Any, panel: Any, columns: int, nt: int, target: Target) -> Any:
    *lead, rows, depth = (int(d) for d in x.shape)
    return _tiles(tuple(lead), rows, depth, columns, lambda b, r, k: x(*b, r, k), panel, nt, target)


def _tiles(
    lead: tuple[int, ...],
    rows: int,
    depth: int,
    columns: int,
    left: Any,
    panel: Any,
    nt: int,
    target: Target,
) -> Any:
    mt = row_tile(rows, target)
    all_rows, all_columns = -(-rows // mt) * mt, -(-columns // nt) * nt
    ragged = rows % mt
    k = te.reduce_axis((0, depth), name="k")
    product = te.compute(
        (*lead, all_rows, all_columns),
        lambda *i: te.sum(
            left(i[:-2], _clamp(i[-2], rows, ragged), k)
            * panel(i[:-2], i[-1] // nt, k, i[-1] % nt),
            axis=k,
        ),
        name="dense",
    )
    if all_rows == rows and all_columns == columns:
        return product
    return te.compute((*lead, rows, columns), lambda *i: product(*i), name="dense_out")


def _clamp(index: Any, size: int, ragged: int) -> Any:
    return tirx.min(index, size - 1) if ragged else index


def _ones(sizes: list[int], rank: int) -> list[int]:
    return [1] * (rank - len(sizes)) + list(sizes)


def _broadcast(index: Any, sizes: list[int]) -> list[Any]:
    """The last len(sizes) of `index`, zero where the size is one."""
    own = list(index)[len(index) - len(sizes) :]
    return [0 if n == 1 else i for i, n in zip(own, sizes, strict=True)]
