"""Rule ``table_attention``: codes to weights by a table held in registers, then a product.

A task takes some row tiles (eight queries) of one head through the blocks of keys. For a row and
a vector of keys: exclusive or (or and) with the row's word, popcount, and the entries of the
head's table by a permutation of registers (AVX-512: vpermps up to 16 entries, vpermi2ps for 32;
elsewhere a load for each lane). The weights of a block stay in the first-level cache and multiply
its values, in register tiles, on top of the output so far. No maximum is followed: the largest
entry is 1.
"""

from __future__ import annotations

from typing import Any

import tvm.s_tir
import tvm_ffi
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.table_attention import TableFacts
from codegen.kernels.tiles import (
    ROWS,
    build,
    fill,
    fold,
    imax,
    imin,
    load,
    panels,
    scratch,
    store,
    tile,
    up,
    vectors,
)
from codegen.kernels.vector_math import at_least, f32, vexp
from codegen.rule import Rule
from codegen.schedules._common import threads
from codegen.schedules._tasks import tiles_per_task
from codegen.target import Target
from passes.forms._table import LOWEST, TINY

NAME = "table_attention"
KEYS = 128  # of one block, at most
WIDE = 16  # lanes of the permutations
_ONE, _TWO = "llvm.x86.avx512.permvar.sf.512", "llvm.x86.avx512.vpermi2var.ps.512"


class _Kernel:
    def __init__(self, facts: TableFacts, target: Target, args: tuple[Any, ...]) -> None:
        self.facts, self.lanes = facts, target.lanes
        self.q, self.k, self.v, self.table, self.out = *args[:4], args[-1]
        self.mask, self.conv = facts.split(args[4:-1])
        self.B, self.H, self.T, self.words = (int(n) for n in self.q.shape)
        self.G, self.S, self.E = (int(n) for n in self.v.shape[1:])
        self.group, self.offset = self.H // self.G, self.S - self.T
        self.permutes = target.lanes == WIDE and "avx512f" in target.features
        self.rows, self.Ep = min(ROWS, self.T), up(self.E, target.lanes)
        self.blocks = -(-self.S // KEYS)
        self.keys = up(-(-self.S // self.blocks), target.lanes)
        self.Sp, self.tiles = self.blocks * self.keys, -(-self.T // self.rows)
        self.share = tiles_per_task(self.B * self.H, self.tiles, threads(target))
        self.padded = self.Sp != self.S
        self.entries = up(facts.bits + 1, WIDE)

    def write(self) -> None:
        """Tables, keys, then the tasks."""
        self._prepare()
        tasks = -(-self.tiles // self.share)
        with T.parallel(0, self.B * self.H * tasks) as n:
            bh, turn = n // tasks, n % tasks
            if self.facts.causal:  # small with large: threads take equal contiguous shares
                turn = tirx.Select(turn % 2 == 0, turn // 2, tasks - 1 - turn // 2)
            self._task(bh // self.H, bh % self.H, turn * self.share)

    def _prepare(self) -> None:
        """Weights [H, entries], key words [B G, W, S'], and which keys are there, [B, S']."""
        last, most = self.facts.bits, scratch(1, 1)
        self.weights = scratch(self.H, self.entries)
        with T.serial(0, self.H) as h:
            T.buffer_store(most, self.table[h, 0], [0, 0])
            with T.serial(0, last) as n:
                more = self.table[h, n + 1]
                T.buffer_store(most, tirx.Select(more > most[0, 0], more, most[0, 0]), [0, 0])
            with T.serial(0, self.entries) as n:
                low = self.table[h, imin(n, last)] - most[0, 0]
                T.buffer_store(self.weights, vexp(at_least(low, LOWEST)), [h, n])
        self.kt = T.sblock_alloc_buffer((self.B * self.G, self.words, self.Sp), "uint32")
        with T.parallel(0, self.B * self.G) as bg, T.serial(0, self.Sp) as j:
            for w in range(self.words):
                word = self.k[bg // self.G, bg % self.G, imin(j, self.S - 1), w]
                T.buffer_store(self.kt, word, [bg, w, j])
        if self.padded or self.mask is not None:
            self.there = scratch(self.B, self.Sp)
            with T.serial(0, self.B) as b, T.serial(0, self.Sp) as j:
                one = j < self.S
                if self.mask is not None:
                    one = tirx.all(one, self._seen(b, imin(j, self.S - 1)))
                T.buffer_store(self.there, tirx.Select(one, f32(1.0), f32(0.0)), [b, j])

    def _seen(self, b: Any, j: Any) -> Any:
        return self.mask[0 if int(self.mask.shape[0]) == 1 else b, j]

    def _task(self, b: Any, h: Any, first: Any) -> None:
        """Row tiles first .. first + share - 1 of one head, block by block of the keys."""
        acc = scratch(self.share * self.rows, self.Ep)
        total = scratch(self.share * self.rows, self.lanes)
        with T.serial(0, self.share * self.rows) as i:
            fill_row(acc, i, self.Ep, self.lanes)
            fill_row(total, i, self.lanes, self.lanes)
        number = imin(self.share, self.tiles - first)
        with T.serial(0, self._blocks(first)) as block, T.serial(0, number) as n:
            row, start = (first + n) * self.rows, block * self.keys
            known = imin(self.keys, self.S - start)
            if self.facts.causal:
                known = imin(known, imax(row + self.rows + self.offset - start, 0))
            w = scratch(self.rows, self.keys)
            with T.serial(0, self.rows) as i:
                self._row(w, total, b, h, imin(row + i, self.T - 1), i, n * self.rows + i, start)
            for e0, width in panels(self.E, self.lanes):
                self._product(w, acc, b, h, n * self.rows, start, known, e0, width)
        with T.serial(0, number) as n, T.serial(0, self.rows) as i:
            row = (first + n) * self.rows + i
            with T.If(row < self.T), T.Then():
                self._store(acc, total, b, h, row, n * self.rows + i)

    def _blocks(self, first: Any) -> Any:
        """How many blocks some row of the task sees."""
        if not self.facts.causal:
            return self.blocks
        seen = imin((first + self.share) * self.rows, self.T) + self.offset
        return imin(imax((seen + self.keys - 1) // self.keys, 0), self.blocks)

    def _row(
        self, w: Any, total: Any, b: Any, h: Any, row: Any, i: Any, at: Any, start: Any
    ) -> None:
        """Weights of one row with the keys of a block, and their sum."""
        bg, lanes = b * self.G + h // self.group, self.lanes
        with T.serial(0, self.keys // lanes) as o:
            if self.permutes:
                self._wide(w, b, h, bg, row, i, start, o * lanes)
            else:
                with T.vectorized(0, lanes) as j:
                    self._narrow(w, b, h, bg, row, i, start, o * lanes + j)
            with T.vectorized(0, lanes) as j:
                T.buffer_store(total, total[at, j] + w[i, o * lanes + j], [at, j])

    def _narrow(
        self, w: Any, b: Any, h: Any, bg: Any, row: Any, i: Any, start: Any, j: Any
    ) -> None:
        """The weight of one pair, by a load from the table."""
        number = None
        for n in range(self.words):
            pair = self.facts.pair(self.kt[bg, n, start + j], self.q[b, h, row, n])
            one = tirx.popcount(pair)
            number = one if number is None else number + one
        found = self.weights[h, tirx.Cast("int32", number)]
        if self.padded or self.mask is not None:
            found = found * self.there[b, start + j]
        if self.facts.causal:
            found = tirx.Select(start + j <= row + self.offset, found, f32(0.0))
        T.buffer_store(w, found, [i, j])

    def _wide(self, w: Any, b: Any, h: Any, bg: Any, row: Any, i: Any, start: Any, j: Any) -> None:
        """The weights of sixteen pairs, by permutations of the table's registers."""
        number = None
        for n in range(self.words):
            keys = self.kt.vload([bg, n, start + j], f"uint32x{WIDE}")
            one = tirx.popcount(self.facts.pair(keys, tirx.Broadcast(self.q[b, h, row, n], WIDE)))
            number = one if number is None else number + one
        at = tirx.reinterpret(f"int32x{WIDE}", number)
        found = self._look_up(h, at)
        if self.padded or self.mask is not None:
            found = found * self.there.vload([b, start + j], f"float32x{WIDE}")
        if self.facts.causal:
            past = tirx.Ramp(start + j, 1, WIDE) <= tirx.Broadcast(row + self.offset, WIDE)
            found = tirx.Select(past, found, tirx.Broadcast(f32(0.0), WIDE))
        T.buffer_store(w, found, [i, tirx.Ramp(j, 1, WIDE)])

    def _look_up(self, h: Any, at: Any) -> Any:
        """Entries `at` of the head's table; permutations read the lowest bits of an index."""
        parts = [
            self.weights.vload([h, n], f"float32x{WIDE}") for n in range(0, self.entries, WIDE)
        ]
        found = None
        for n in range(0, len(parts), 2):
            two = parts[n : n + 2]
            one = _call(_ONE, two[0], at) if len(two) == 1 else _call(_TWO, two[0], at, two[1])
            edge = tirx.Broadcast(tirx.const(n * WIDE, "int32"), WIDE)
            found = one if found is None else tirx.Select(at >= edge, one, found)
        return found

    def _product(
        self, w: Any, acc: Any, b: Any, h: Any, at: Any, start: Any, known: Any, e0: int, width: int
    ) -> None:
        """The weights of a row tile times the values of a block, on top of `acc`."""
        when = None
        if self.mask is not None:  # what a hidden key holds is not read
            when = lambda j: self._seen(b, start + j)  # noqa: E731

        def value(j: Any, e: Any) -> Any:
            return load(self.v, b, h // self.group, start + j, imin(e0 + e, self.E - 1))

        def whole(j: Any, e: Any) -> Any:
            return load(self.v, b, h // self.group, start + j, e0 + e)

        tile(
            lambda i, j: w[i, j],
            whole if e0 + width <= self.E else value,
            known,
            lambda i, e, s: T.buffer_store(acc, s, [at + i, e0 + e]),
            rows=self.rows,
            width=width,
            start=lambda i, e: acc[at + i, e0 + e],
            when=when,
        )

    def _store(self, acc: Any, total: Any, b: Any, h: Any, row: Any, at: Any) -> None:
        one, safe = scratch(1, self.lanes), scratch(1, 1)
        with T.vectorized(0, self.lanes) as j:
            T.buffer_store(one, total[at, j], [0, j])
        T.buffer_store(safe, at_least(fold(one, self.lanes, lambda x, y: x + y), TINY), [0, 0])
        if self.conv is not None:
            self._around(acc, safe, b, h, row, at)
            return
        vectors(
            self.E,
            self.lanes,
            lambda e: store(self.out, [b, h, row, e], acc[at, e] / safe[0, 0]),
        )

    def _around(self, acc: Any, safe: Any, b: Any, h: Any, row: Any, at: Any) -> None:
        """Store a row with the convolution of the values around it."""
        g, near = h // self.group, scratch(1, self.Ep)
        fill(near, 1, self.Ep)
        with T.serial(0, self.facts.taps) as t:
            j = row + t - self.facts.taps // 2
            inside = [j >= 0, j < self.S]
            if self.mask is not None:
                inside.append(self._seen(b, imax(imin(j, self.S - 1), 0)))
            with T.If(tirx.all(*inside)), T.Then():
                vectors(
                    self.E,
                    self.lanes,
                    lambda e: T.buffer_store(
                        near, near[0, e] + self.conv[g, t] * load(self.v, b, g, j, e), [0, e]
                    ),
                )
        vectors(
            self.E,
            self.lanes,
            lambda e: store(self.out, [b, h, row, e], acc[at, e] / safe[0, 0] + near[0, e]),
        )


def fill_row(buffer: Any, row: Any, width: int, lanes: int) -> None:
    """Zeros in one row of a scratch buffer of whole vectors."""
    vectors(width, lanes, lambda j: T.buffer_store(buffer, f32(0.0), [row, j]))


def _call(name: str, *args: Any) -> Any:
    known = tvm_ffi.get_global_func("target.llvm_lookup_intrinsic_id")(name)
    return tirx.call_llvm_pure_intrin(f"float32x{WIDE}", tirx.const(known, "uint32"), *args)


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a table attention made by the kit, None for anything else."""
    known = facts_of(func, NAME)
    if known is None:
        return None
    facts = TableFacts(**known)
    return tvm.s_tir.Schedule(build(func, lambda *args: _Kernel(facts, target, args).write()))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
