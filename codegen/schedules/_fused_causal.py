"""Causal fused linear attention: chunks in order, the state in the cache.

Inside a chunk queries meet keys by masked scores, before it by the state. Where heads do not load
the threads evenly, the chunks of a head are cut into pieces: the states before all pieces come
first (from features that are made a second time), then the pieces run at once.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.folds import power_of_two
from codegen.kernels.linear_attention import CHUNK
from codegen.kernels.tiles import ROWS, fill, imax, imin, scratch, store, tile, up, vectors
from codegen.kernels.vector_math import f32
from codegen.schedules._fetch import fetching
from codegen.schedules._fused_linear import Part, Shared

AGAIN = 0.4  # cost of adding a chunk to a state, in parts of all that is done for it


class Causal(Shared):
    """Causal, one task for each piece of a (batch, key head)."""

    def write(self) -> None:
        """Emit the whole kernel."""
        self.fk.pack()
        self.fq.pack()
        heads = self.B * self.G
        # Query first_query + n sees keys up to first_key + n.
        self.first_query, self.first_key = max(self.T - self.S, 0), max(self.S - self.T, 0)
        self.tokens = self.T - self.first_query
        self.width = 2 * self.lanes
        self.size = up(min(CHUNK, self.tokens), max(self.width, ROWS))
        self.fq.ragged = self.tokens % self.fq.rows != 0
        self.fk.ragged = True
        self.chunks = -(-self.tokens // self.size)
        self.pieces = self._pieces(heads, self.chunks)
        self.share = -(-self.chunks // self.pieces)
        blocks = -(-self.first_key // self.size)
        self.olds = self._pieces(heads, blocks) if blocks else 1
        self.old_share = -(-blocks // self.olds) * self.size
        entries = self.olds + self.pieces - 1
        self.state = scratch(heads, entries, self.F, self.Ep)
        self.norm = scratch(heads, entries, self.F)
        with T.parallel(0, heads * entries, annotations=fetching(self.target)) as n:
            self._sum(n // entries, n % entries)
        if entries > 1:
            with T.parallel(0, heads) as bg:
                self._prefix(bg, entries)
        with T.parallel(0, heads * self.pieces) as n:
            self._piece(n // self.pieces, n % self.pieces)

    def _pieces(self, heads: int, chunks: int) -> int:
        def cost(n: int) -> float:
            share = -(-chunks // n)
            again = -(-heads * (n - 1) // self.workers) * AGAIN
            return (-(-heads * n // self.workers) + again) * share

        return min(range(1, min(chunks, 2 * self.workers) + 1), key=cost)

    def _sum(self, bg: Any, entry: Any) -> None:
        """States of pieces of the older keys, then those of all pieces but the last."""
        old = entry < self.olds
        turn = entry - self.olds
        span = self.share * self.size
        first = tirx.Select(old, entry * self.old_share, self.first_key + turn * span)
        last = tirx.Select(
            old,
            imin((entry + 1) * self.old_share, self.first_key),
            imin(self.first_key + (turn + 1) * span, self.S),
        )
        self.sum_keys(bg, entry, first, imax(first, last), True)

    def _prefix(self, bg: Any, entries: int) -> None:
        """Each state plus those before it."""
        with T.serial(1, entries) as n:
            state, norm = Part(self.state, bg, n), Part(self.norm, bg, n)
            with T.serial(0, self.F) as r:
                vectors(
                    self.Ep,
                    self.lanes,
                    lambda e: state.put(state(r, e) + self.state[bg, n - 1, r, e], r, e),
                )
            vectors(self.F, self.lanes, lambda r: norm.put(norm(r) + self.norm[bg, n - 1, r], r))

    def _piece(self, bg: Any, piece: Any) -> None:
        b, g = bg // self.G, bg % self.G
        self.keys, self.values = scratch(self.size, self.stride), scratch(self.size, self.Ep)
        self.turned = scratch(self.size // self.width, self.F, self.width)
        # A piece goes on with the state before it, which nobody else reads any more.
        state = Part(self.state, bg, self.olds - 1 + piece)
        norm = Part(self.norm, bg, self.olds - 1 + piece)
        if self.first_query:
            with T.If(piece == 0), T.Then():
                self._blind(b, g)
        seen = self.shown(b, self.S)
        with T.serial(0, imin(self.share, self.chunks - piece * self.share)) as c:
            start = (piece * self.share + c) * self.size
            first, number = self.first_key + start, self._tiles(start, self.fk.rows)
            self.fk.block(b, g, first, number, self.keys, seen)
            self.load_values(b, g, first, self.size, self.values, seen)
            with T.serial(0, number * self.fk.rows) as x, T.serial(0, self.F) as r:
                at = [x // self.width, r, x % self.width]
                T.buffer_store(self.turned, self.keys[x, r], at)
            with T.serial(0, self.group) as part:
                self._queries(b, g * self.group + part, start, state, norm)
            self.absorb(self.keys, self.values, number * self.fk.rows, state, norm)

    def _tiles(self, start: Any, rows: int) -> Any:
        """Row tiles of the chunk from `start` that hold tokens."""
        return imin(-(-self.size // rows), (self.tokens - start + rows - 1) // rows)

    def _blind(self, b: Any, g: Any) -> None:
        """Queries before the first key see nothing."""
        with T.grid(self.group, self.first_query, self.E) as (part, i, e):
            store(self.out, [b, g * self.group + part, i, e], f32(0.0))

    def _queries(self, b: Any, h: Any, start: Any, state: Part, norm: Part) -> None:
        rows = self.fq.rows
        features = scratch(up(self.size, rows), self.stride)
        number, first = self._tiles(start, rows), self.first_query + start
        self.fq.block(b, h, first, number, features, None)
        with T.serial(0, number) as t:
            query = lambda i, r: features[t * rows + i, r]  # noqa: E731
            self._tile(b, h, first + t * rows, t * rows, query, state, norm)

    def _tile(
        self, b: Any, h: Any, first: Any, row: Any, query: Any, state: Part, norm: Part
    ) -> None:
        rows, width = self.fq.rows, self.width
        scores, bottom = scratch(rows, self.size), scratch(1, power_of_two(rows))
        used = imin((row + rows + width - 1) // width, self.size // width)
        with T.serial(0, used) as p:
            tile(
                query,
                lambda r, x: self.turned[p, r, x],
                self.F,
                lambda i, x, s: T.buffer_store(
                    scores,
                    tirx.Select(p * width + x <= row + i, s, f32(0.0)),
                    [i, p * width + x],
                ),
                rows=rows,
                width=width,
            )

        sums = scratch(rows, self.lanes)
        fill(sums, rows, self.lanes)
        with T.serial(0, used * 2) as o, T.unroll(0, rows) as i, T.vectorized(0, self.lanes) as x:
            T.buffer_store(sums, sums[i, x] + scores[i, o * self.lanes + x], [i, x])
        self.bottoms(query, rows, norm, bottom, 0, lambda i, x: sums[i, x])
        for e0, columns in self.columns:
            near = (
                imin(row + rows, self.size),
                lambda i, x: scores[i, x],
                lambda x, e, e0=e0: self.values[x, e0 + e],
            )
            before = (self.F, query, lambda r, e, e0=e0: state(r, e0 + e))
            whole = scratch(rows, columns)
            tile(
                query,
                query,
                [near, before],
                lambda i, e, s, o=whole: T.buffer_store(  # type: ignore[misc]
                    o, s * bottom[0, i], [i, e]
                ),
                rows=rows,
                width=columns,
            )
            self.write_rows(b, h, first, whole, e0, columns)
