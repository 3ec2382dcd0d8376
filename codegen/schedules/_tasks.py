"""How softmax attention is cut: keys into blocks, row tiles into tasks."""

from __future__ import annotations

from codegen.target import Target

TILES = 4  # most row tiles of a task
MOST_KEYS = 512  # of one block


def most_tiles(target: Target, *, windowed: bool) -> int:
    """Most row tiles of a task: twice as many with AVX-512, where it was measured.

    Not with a window: all tiles of a task go through the keys that any of them sees.
    """
    return TILES if windowed or target.lanes != 16 else 2 * TILES


def block_panels(total: int, width: int, l1_bytes: int) -> int:
    """Key panels of one block: two thirds of the cache hold its scores, or its panel of V."""
    most = max(1, min(MOST_KEYS, l1_bytes * 2 // 3 // (4 * width)) // width)
    return -(-total // -(-total // most))


def tiles_per_task(heads: int, tiles: int, workers: int, most: int = TILES) -> int:
    """Row tiles of a task: many share what is in the cache, but all threads get as many."""

    def cost(n: int) -> float:
        return -(-heads * -(-tiles // n) // workers) * n * (1 + 0.04 * (most / n - 1))

    return min(range(1, min(most, tiles) + 1), key=cost)
