"""Kernel of one decoding step of the window and linear hybrid (passes/forms/_near.py).

The last two blocks of C tokens stand in a ring, token j at place j mod 2 C; older tokens are in the
sums. Each batch and key/value head is a task. Sums are float32. Letters as in passes/site.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import MINIMUM
from codegen.kernels.decode import ROWS, Tensor, add_to, build_step, columns, dims
from codegen.kernels.tiles import imax, load, reduce_row, scratch, store, tile, vectors
from codegen.kernels.vector_math import f32, vexp_weight


@dataclass(frozen=True)
class Facts:
    """What the tensors do not say: the logits' scale, C and the least denominator."""

    scale: float
    window: int
    eps: float


def hybrid_step(facts: Facts, tensors: dict[str, Tensor], lanes: int) -> Any:
    """q, k, v, fq, fk, mix, position, keys, values, part, part_norm, sum, norm -> out.

    q [B, H, T, D], k [B, G, T, D], v [B, G, T, E], fq [B, H, T, F], fk [B, G, T, F], mix [H],
    position [B, T] int64 (the first is read); the rest is the state, as `ring_state` has it, which
    each token changes before its queries read it; out [B, H, T, E].
    """

    def body(*args: Any) -> None:
        held = dict(zip(tensors, args, strict=True))
        _Step(facts, lanes, held).write()

    return build_step(tensors, body)


class _Step:
    def __init__(self, facts: Facts, lanes: int, held: dict[str, Any]) -> None:
        self.facts, self.lanes, self.held = facts, lanes, held
        self.B, self.H, self.T, self.D = dims(held["q"])
        self.G, self.E, self.F = dims(held["k"])[1], dims(held["v"])[3], dims(held["fk"])[3]
        self.blocks, self.block = dims(held["keys"])[2], dims(held["keys"])[4]
        self.ring = 2 * facts.window

    def write(self) -> None:
        """Emit the kernel."""
        group = self.H // self.G
        first = imax(0, tirx.Cast("int32", self.held["position"][0, 0]))
        with T.parallel(0, self.B * self.G) as bg:
            b, g = bg // self.G, bg % self.G
            with T.serial(0, self.T) as t:
                at = first + t
                half = at // self.facts.window % 2
                with T.If(at % self.facts.window == 0), T.Then():
                    self._leave(b, g, half)
                self._take(b, g, t, at % self.ring, half)
                for start in range(0, group, ROWS):
                    rows = min(ROWS, group - start)
                    self._read(b, g, g * group + start, t, at, rows)

    def _leave(self, b: Any, g: Any, half: Any) -> None:
        """The sums of the block whose place is taken join those of the older ones."""
        with T.serial(0, self.F) as r:
            self._move("sum", [b, g], "part", [b, g, half], [r], self.E)
        self._move("norm", [b, g], "part_norm", [b, g, half], [], self.F)

    def _move(
        self, to: str, at: list[Any], source: str, place: list[Any], row: list[Any], width: int
    ) -> None:
        whole, part = self.held[to], self.held[source]

        def one(e: Any) -> None:
            there, here = [*at, *row, e], [*place, *row, e]
            T.buffer_store(whole, whole[tuple(there)] + part[tuple(here)], there)
            T.buffer_store(part, f32(0.0), here)

        vectors(width, self.lanes, one)

    def _take(self, b: Any, g: Any, t: Any, place: Any, half: Any) -> None:
        keys, values, k, v, fk = (self.held[n] for n in ("keys", "values", "k", "v", "fk"))
        with T.serial(0, self.D) as d:
            at = [b, g, place // self.block, d, place % self.block]
            T.buffer_store(keys, load(k, b, g, t, d), at)
        vectors(
            self.E,
            self.lanes,
            lambda e: T.buffer_store(values, load(v, b, g, t, e), [b, g, place, e]),
        )
        part, norm = self.held["part"], self.held["part_norm"]
        with T.serial(0, self.F) as r:
            add_to(part, [b, g, half, r], self.E, self.lanes, load(fk, b, g, t, r), v, [b, g, t])
        add_to(norm, [b, g, half], self.F, self.lanes, f32(1.0), fk, [b, g, t])

    def _read(self, b: Any, g: Any, head: Any, t: Any, at: Any, rows: int) -> None:
        fq, values, sums = self.held["fq"], self.held["values"], self.held["sum"]
        scores, under = scratch(rows, self.blocks * self.block), scratch(rows)
        self._scores(scores, b, g, head, t, at, rows)
        for i in range(rows):
            self._terms(scores, under, i, b, g, head + i, t)
        for start, panel in columns(self.E):
            near = (
                self.ring,
                lambda i, j: scores[i, j],
                lambda j, e, s=start: load(values, b, g, j, s + e),
            )
            far = (
                self.F,
                lambda i, r: load(fq, b, head + i, t, r),
                lambda r, e, s=start: sums[b, g, r, s + e],
            )
            tile(
                near[1],
                near[2],
                [near, far],
                lambda i, e, x, s=start: store(  # type: ignore[misc]
                    self.held["out"], [b, head + i, t, s + e], x * under[i]
                ),
                rows=rows,
                width=panel,
            )

    def _scores(self, scores: Any, b: Any, g: Any, head: Any, t: Any, at: Any, rows: int) -> None:
        """Scaled logits of the ring's places; `MINIMUM` where no token near the query stands."""
        q, keys = self.held["q"], self.held["keys"]
        query = scratch(rows, self.D)
        for i in range(rows):
            vectors(
                self.D,
                self.lanes,
                lambda d, i=i: T.buffer_store(  # type: ignore[misc]
                    query, load(q, b, head + i, t, d) * f32(self.facts.scale), [i, d]
                ),
            )
        with T.serial(0, self.blocks) as n:
            tile(
                lambda i, d: query[i, d],
                lambda d, j: keys[b, g, n, d, j],
                self.D,
                lambda i, j, x: T.buffer_store(
                    scores,
                    tirx.Select(self._near(n * self.block + j, at), x, f32(MINIMUM)),
                    [i, n * self.block + j],
                ),
                rows=rows,
                width=self.block,
            )

    def _near(self, place: Any, at: Any) -> Any:
        """Whether a token of the query's block up to itself, or of the block before, is there."""
        window, own = self.facts.window, at % self.ring
        before = tirx.all(
            place >= window, place < self.ring, own < window, at >= self.ring
        )  # an odd block is before an even one only in the places behind it
        return tirx.any(place <= own, before)

    def _terms(self, scores: Any, under: Any, i: int, b: Any, g: Any, head: Any, t: Any) -> None:
        """Scores of row i to sigmoid(mix) exp(score - largest), under[i] to 1 / denominator."""
        lanes, steps = self.lanes, self.blocks * self.block // self.lanes
        fq, norm, held = self.held["fq"], self.held["norm"], scratch(3)
        places = steps * lanes
        top = reduce_row(places, lanes, lambda j: scores[i, j], tirx.max, MINIMUM)
        T.buffer_store(held, top, [0])
        T.buffer_store(held, tirx.sigmoid(load(self.held["mix"], head)), [1])
        with T.serial(0, steps) as o, T.vectorized(0, lanes) as j:
            value = vexp_weight(scores[i, o * lanes + j] - held[0]) * held[1]
            T.buffer_store(scores, value, [i, o * lanes + j])
        total = reduce_row(places, lanes, lambda j: scores[i, j], lambda x, y: x + y, 0.0)
        T.buffer_store(held, total, [2])
        far = reduce_row(
            self.F,
            lanes,
            lambda r: load(fq, b, head, t, r) * norm[b, g, r],
            lambda x, y: x + y,
            0.0,
        )
        below = tirx.max(held[2] + far, f32(self.facts.eps))
        T.buffer_store(under, f32(1.0) / below, [i])
