"""Rule ``hybrid``: softmax near a query, features far from it, in register tiles.

States of all blocks are summed in parallel, added up from either end, then tiles of rows read
both. A column of ones beside the values carries the denominator along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.hybrid import LOWEST, HybridFacts, Sizes
from codegen.kernels.tiles import (
    ROWS,
    build,
    fill,
    imin,
    load,
    reduce_row,
    scratch,
    up,
    vectors,
)
from codegen.kernels.vector_math import f32, vexp_weight
from codegen.rule import Rule
from codegen.schedules._near_far import NearFar
from codegen.target import Target

NAME = "hybrid"


class _Hybrid(NearFar, Sizes):
    def __init__(self, facts: HybridFacts, lanes: int, args: Sequence[Any]) -> None:
        super().__init__(facts, args[:-1], args[-1])
        self.lanes, self.Ep = lanes, up(self.E + 1, lanes)
        self.Rp, self.width = up(self.R, ROWS), up(self.near, lanes)
        self.columns = self.T + self.width  # keys read beyond the last token are hidden
        heads = self.B * self.G
        self.values = scratch(heads, self.columns, self.Ep)
        self.turned = scratch(heads, self.D, self.columns)
        self.keep = scratch(self.B, self.columns)
        self.part = scratch(heads, self.blocks, self.Rp, self.Ep)
        self.far = scratch(heads, self.blocks, self.Rp, self.Ep)

    def write(self) -> None:
        self.widen(lambda b, j: j < self.T)
        self.turn(self.k, self.D)
        with T.serial(0, self.B) as b, T.serial(0, self.columns) as j:
            shown = j < self.T
            if self.mask is not None:
                shown = tirx.all(shown, self.shown(b, imin(j, self.T - 1)))
            T.buffer_store(self.keep, tirx.Select(shown, f32(1.0), f32(0.0)), [b, j])
        self.sums(None if self.mask is None else self.shown)
        with T.parallel(0, self.B * self.G * self.Rp) as n:
            self._add_up(n // self.Rp, n % self.Rp)
        self.read()

    def _add_up(self, bg: Any, r: Any) -> None:
        """far of block n: the blocks up to n - 2, and (not causal) from n + 2 on."""
        run, last = scratch(1, self.Ep), self.blocks - 1
        fill(run, 1, self.Ep)
        with T.serial(0, self.blocks) as n:
            vectors(
                self.Ep,
                self.lanes,
                lambda e: T.buffer_store(self.far, run[0, e], [bg, n, r, e]),
            )
            with T.If(n > 0), T.Then():
                self.add_part(run, bg, n - 1, r)
        if self.causal:
            return
        fill(run, 1, self.Ep)
        with T.serial(0, self.blocks - 2) as back:
            n = last - 2 - back
            self.add_part(run, bg, n + 2, r)
            vectors(
                self.Ep,
                self.lanes,
                lambda e: T.buffer_store(
                    self.far, self.far[bg, n, r, e] + run[0, e], [bg, n, r, e]
                ),
            )

    def read_tile(self, b: Any, h: Any, block: Any, part: Any) -> None:
        rows = min(ROWS, self.C)
        row, bg = part * rows, b * self.G + h // self.group
        powers, scale = scratch(rows, self.width), f32(self.facts.scale)
        query, features = scratch(rows, self.D), scratch(rows, self.R)

        def token(i: Any) -> Any:
            return self.token(block, row + i)

        self.copy(rows, self.D, query, lambda i, d: load(self.q, b, h, token(i), d) * scale)
        self.copy(rows, self.R, features, lambda i, r: load(self.fq, b, h, token(i), r))
        self._scores(b, bg, block, token, query, powers)
        with T.serial(0, rows) as i:
            self._powers(h, powers, i)
        self.write_rows((b, h, block, row), bg, powers, features, self.facts.eps)

    def _scores(self, b: Any, bg: Any, block: Any, token: Any, query: Any, powers: Any) -> None:
        """Logits of the keys near; hidden ones are LOWEST."""
        first = self.first_near(block)

        def put(i: Any, j: Any, s: Any) -> None:
            key = first + j
            seen = self.keep[b, key] > f32(0.0)
            last = token(i) + 1 if self.causal else (block + 2) * self.C
            seen = tirx.all(seen, key < last)
            T.buffer_store(powers, tirx.Select(seen, s, f32(LOWEST)), [i, j])

        self.near_products(query, self.D, bg, first, put)

    def _powers(self, h: Any, powers: Any, i: Any) -> None:
        """exp(logit - maximum) times the head's share; 0 for a row without a key near."""
        top, share = scratch(1, 1), scratch(1, 1)
        peak = reduce_row(self.width, self.lanes, lambda j: powers[i, j], tirx.max, LOWEST)
        T.buffer_store(top, peak, [0, 0])
        part = f32(1.0) / (f32(1.0) + tirx.exp(f32(0.0) - load(self.mix, h)))
        some = tirx.Select(top[0, 0] > f32(LOWEST / 2), part, f32(0.0))
        T.buffer_store(share, some, [0, 0])
        vectors(
            self.width,
            self.lanes,
            lambda j: T.buffer_store(
                powers, vexp_weight(powers[i, j] - top[0, 0]) * share[0, 0], [i, j]
            ),
        )


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled hybrid kernel, None for anything else."""
    data = facts_of(func, NAME)
    if data is None:
        return None
    facts = HybridFacts.from_json(data)
    body = build(func, lambda *args: _Hybrid(facts, target.lanes, args).write())
    return tvm.s_tir.Schedule(body)


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
