"""Rule ``linear_attention_fused``: from q, k and v to the output without features in memory.

Bidirectional: a task takes blocks of keys of one head, makes their features in a buffer that
stays in the cache and adds them to a state of its own; states of one head are added; then tasks
over blocks of queries make features the same way and read the state.
"""

from __future__ import annotations

from typing import Any

import tvm.s_tir
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.folds import power_of_two
from codegen.kernels.fused_linear import FusedFacts
from codegen.kernels.tiles import build, imin, scratch, tile, up, vectors
from codegen.kernels.views import take_layout
from codegen.rule import Rule
from codegen.schedules._fetch import fetching
from codegen.schedules._fused_causal import Causal
from codegen.schedules._fused_linear import KEYS, QUERIES, Part, Shared
from codegen.target import Target

NAME = "linear_attention_fused"


def pieces(heads: int, blocks: int, workers: int, extra: float) -> int:
    """Pieces of each head's blocks, so that all workers get as much; `extra` blocks each cost."""

    def cost(n: int) -> float:
        return -(-heads * n // workers) * (-(-blocks // n) + extra)

    return min(range(1, min(blocks, 2 * workers) + 1), key=cost)


class Whole(Shared):
    """Bidirectional."""

    def write(self) -> None:
        """Emit the whole kernel."""
        self.fk.pack()
        self.fq.pack()
        heads = self.B * self.G
        self.size = min(KEYS, up(self.S, self.fk.rows))
        blocks = -(-self.S // self.size)
        self.pieces = pieces(heads, blocks, self.workers, 0.5)
        self.state = scratch(heads, self.pieces, self.F, self.Ep)
        self.norm = scratch(heads, self.pieces, self.F)
        share = -(-blocks // self.pieces)
        with T.parallel(0, heads * self.pieces, annotations=fetching(self.target)) as n:
            bg, piece = n // self.pieces, n % self.pieces
            first = piece * share * self.size
            last = imin(first + share * self.size, self.S)
            self.sum_keys(bg, piece, first, last, self.S % self.size != 0)
        if self.pieces > 1:
            with T.parallel(0, heads) as bg:
                self._join(bg)
        size = min(QUERIES, up(self.T, self.fq.rows))
        blocks = -(-self.T // size)
        parts = pieces(self.B * self.H, blocks, self.workers, 0.1)
        share = -(-blocks // parts)
        with T.parallel(0, self.B * self.H * parts) as n:
            bh, first = n // parts, n % parts * share
            features = scratch(size, self.stride)
            with T.serial(0, imin(share, blocks - first)) as block:
                self._read(bh // self.H, bh % self.H, (first + block) * size, size, features)

    def _join(self, bg: Any) -> None:
        """Add all pieces into the first."""
        with T.serial(1, self.pieces) as p:
            state, norm = Part(self.state, bg, 0), Part(self.norm, bg, 0)
            with T.serial(0, self.F) as r:
                vectors(
                    self.Ep,
                    self.lanes,
                    lambda e: state.put(state(r, e) + self.state[bg, p, r, e], r, e),
                )
            vectors(self.F, self.lanes, lambda r: norm.put(norm(r) + self.norm[bg, p, r], r))

    def _read(self, b: Any, h: Any, first: Any, size: int, features: Any) -> None:
        rows, bg = self.fq.rows, b * self.G + h // self.group
        tiles: Any = size // rows
        if self.T % size:
            tiles = imin(tiles, (self.T - first + rows - 1) // rows)
        self.fq.block(b, h, first, tiles, features, None)
        bottom = scratch(size // rows, power_of_two(rows))
        norm = Part(self.norm, bg, 0)
        with T.serial(0, tiles) as t:
            query = lambda i, r: features[t * rows + i, r]  # noqa: E731
            self.bottoms(query, rows, norm, bottom, t, None)
        for e0, width in self.columns:
            with T.serial(0, tiles) as t:
                whole = scratch(rows, width)
                tile(
                    lambda i, r, t=t: features[t * rows + i, r],  # type: ignore[misc]
                    lambda r, e, e0=e0: self.state[bg, 0, r, e0 + e],  # type: ignore[misc]
                    self.F,
                    lambda i, e, s, t=t, o=whole: T.buffer_store(  # type: ignore[misc]
                        o, s * bottom[t, i], [i, e]
                    ),
                    rows=rows,
                    width=width,
                )
                self.write_rows(b, h, first + t * rows, whole, e0, width)


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a fused linear attention, None for anything else."""
    data = facts_of(func, NAME)
    if data is None:
        return None
    layout = take_layout(data, 3)
    assert layout is not None
    facts = FusedFacts.from_json(data)

    def body(*args: Any) -> None:
        *inputs, out = args
        tensors, rest = layout.split(inputs)
        view = layout.output(out, (*tensors[0].shape[:3], tensors[2].shape[3]))
        kind = Causal if facts.causal else Whole
        kind(facts, target, [*tensors, *rest], view).write()

    return tvm.s_tir.Schedule(build(func, body))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
