"""Rule ``hamming_attention``: sums of signed values by tables of four code bits.

Bidirectional: a key adds its value to one bucket of sixteen for every four bits of its code; the
buckets of a head become tables of signed sums, and a query adds one row of each table. This is
the sum over b bits with b / 4 additions for each value instead of b multiply-adds. Causal: one
key after the other enters the state with the signs of its bits, and its query reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.hamming import WORD, flip, signed, u32
from codegen.kernels.tiles import build, imin, load, scratch, store, up, vectors
from codegen.kernels.vector_math import at_least, f32
from codegen.rule import Rule
from codegen.target import Target

NAME = "hamming_attention"
NIBBLE = 4  # code bits of a table
ENTRIES = 1 << NIBBLE
PIECE = 256  # least tokens of one parallel piece of the buckets
TASKS = 16
READS = 64  # queries of one parallel task


class _Shared:
    def __init__(self, facts: dict[str, Any], lanes: int, args: tuple[Any, ...]) -> None:
        self.bits, self.beta = int(facts["bits"]), float(facts["beta"])
        self.own, self.eps, self.lanes = bool(facts["own"]), float(facts["eps"]), lanes
        self.q, self.k, self.v, self.out = *args[:3], args[-1]
        self.mask: Any = args[3] if len(args) == 5 else None
        self.B, self.H, self.T = (int(n) for n in self.q.shape[:3])
        self.G, self.S, self.E = (int(n) for n in self.v.shape[1:])
        self.share, self.Ep = self.H // self.G, up(self.E, lanes)

    def seen(self, b: Any, j: Any) -> Any:
        """Whether the key mask shows key j."""
        return self.mask[0 if int(self.mask.shape[0]) == 1 else b, j]

    def each(self, body: Callable[[Any], None]) -> None:
        """body(e) over the E values of a row, in vectors."""
        vectors(self.E, self.lanes, body)

    def padded(self, body: Callable[[Any], None]) -> None:
        """body(e) over the values of a padded row, in vectors."""
        vectors(self.Ep, self.lanes, body)


class Tables(_Shared):
    """Bidirectional."""

    def take(self, value: Any, turn: Any) -> Any:
        """What a code bit makes of a value; the sign bit of `turn` is set where the bit is not."""
        return signed(value, turn)

    def write(self) -> None:
        """Buckets, tables, reads."""
        heads = self.B * self.G
        self.tables = -(-self.bits // NIBBLE)
        self.pieces = max(1, min(self.S // PIECE, -(-TASKS // heads)))
        self.length = -(-self.S // self.pieces)
        self.sums = scratch(heads, self.pieces, self.tables, ENTRIES, self.Ep)
        self.counts = scratch(heads, self.pieces, self.tables, ENTRIES)
        with T.parallel(0, heads * self.pieces) as n:
            self._fill(n // self.pieces, n % self.pieces)
        with T.parallel(0, heads) as bg:
            if self.pieces > 1:
                self._join(bg)
            for n in range(self.tables):
                self._table(bg, n, min(NIBBLE, self.bits - n * NIBBLE))
        tasks = -(-self.T // READS)
        with T.parallel(0, self.B * self.H * tasks) as n:
            bh, first = n // tasks, (n % tasks) * READS
            number = imin(READS, self.T - first) if self.T % READS else READS
            with T.serial(0, number) as i:
                self.read(bh // self.H, bh % self.H, first + i)

    def entry(self, words: Any, at: list[Any], n: int) -> Any:
        """The entry of table `n` that a code selects."""
        per = WORD // NIBBLE
        part = words[(*at, n // per)] >> u32(NIBBLE * (n % per))
        return tirx.Cast("int32", part & u32(ENTRIES - 1))

    def _fill(self, bg: Any, piece: Any) -> None:
        """Add every value of a piece of the keys to a bucket of each table."""
        b, g, first = bg // self.G, bg % self.G, piece * self.length
        with T.serial(0, self.tables) as n, T.serial(0, ENTRIES) as x:
            T.buffer_store(self.counts, f32(0.0), [bg, piece, n, x])
            vectors(
                self.Ep,
                self.lanes,
                lambda e: T.buffer_store(self.sums, f32(0.0), [bg, piece, n, x, e]),
            )
        number = imin(self.length, self.S - first) if self.S % self.pieces else self.length
        with T.serial(0, number) as i:
            j = first + i
            if self.mask is None:
                self._put(bg, piece, b, g, j)
            else:
                with T.If(self.seen(b, j)), T.Then():
                    self._put(bg, piece, b, g, j)

    def _put(self, bg: Any, piece: Any, b: Any, g: Any, j: Any) -> None:
        for n in range(self.tables):
            at = T.sblock_alloc_buffer((1,), "int32")
            T.buffer_store(at, self.entry(self.k, [b, g, j], n), [0])
            place = [bg, piece, n, at[0]]
            T.buffer_store(self.counts, self.counts[(*place,)] + f32(1.0), place)

            def add(e: Any, place: list[Any] = place) -> None:
                more = load(self.v, b, g, j, e)
                T.buffer_store(self.sums, self.sums[(*place, e)] + more, [*place, e])

            self.each(add)

    def _join(self, bg: Any) -> None:
        """Add all pieces into the first."""
        with (
            T.serial(1, self.pieces) as p,
            T.serial(0, self.tables) as n,
            T.serial(0, ENTRIES) as x,
        ):
            more = self.counts[bg, 0, n, x] + self.counts[bg, p, n, x]
            T.buffer_store(self.counts, more, [bg, 0, n, x])
            vectors(
                self.Ep,
                self.lanes,
                lambda e: T.buffer_store(
                    self.sums,
                    self.sums[bg, 0, n, x, e] + self.sums[bg, p, n, x, e],
                    [bg, 0, n, x, e],
                ),
            )

    def _table(self, bg: Any, n: int, bits: int) -> None:
        """Buckets of table `n` -> for every entry the sum of the states with its signs."""
        entries = 1 << bits
        state, z = scratch(NIBBLE, self.Ep), scratch(NIBBLE, 1)
        base, number = scratch(1, self.Ep), scratch(1, 1)
        T.buffer_store(number, f32(0.0), [0, 0])
        self.padded(lambda e: T.buffer_store(base, f32(0.0), [0, e]))
        with T.serial(0, bits) as r:
            T.buffer_store(z, f32(0.0), [r, 0])
            self.padded(lambda e: T.buffer_store(state, f32(0.0), [r, e]))
            with T.serial(0, entries) as x:
                turn = flip(tirx.Cast("uint32", x), r)
                T.buffer_store(z, z[r, 0] + self.take(self.counts[bg, 0, n, x], turn), [r, 0])
                self.padded(
                    lambda e: T.buffer_store(
                        state, state[r, e] + self.take(self.sums[bg, 0, n, x, e], turn), [r, e]
                    )
                )
        if n == 0:
            self._constant(bg, entries, base, number)
        with T.serial(0, entries) as x:
            T.buffer_store(self.counts, number[0, 0], [bg, 0, n, x])
            self.padded(lambda e: T.buffer_store(self.sums, base[0, e], [bg, 0, n, x, e]))
            with T.serial(0, bits) as r:
                turn = flip(tirx.Cast("uint32", x), r)
                more = self.counts[bg, 0, n, x] + self.take(z[r, 0], turn)
                T.buffer_store(self.counts, more, [bg, 0, n, x])
                self.padded(
                    lambda e: T.buffer_store(
                        self.sums,
                        self.sums[bg, 0, n, x, e] + self.take(state[r, e], turn),
                        [bg, 0, n, x, e],
                    )
                )

    def _constant(self, bg: Any, entries: int, base: Any, number: Any) -> None:
        """beta times the sum of all values and times their number."""
        with T.serial(0, entries) as x:
            T.buffer_store(number, number[0, 0] + self.counts[bg, 0, 0, x], [0, 0])
            if not self.own:
                vectors(
                    self.Ep,
                    self.lanes,
                    lambda e: T.buffer_store(base, base[0, e] + self.sums[bg, 0, 0, x, e], [0, e]),
                )
        beta = f32(self.beta)
        T.buffer_store(number, number[0, 0] * beta, [0, 0])
        vectors(self.Ep, self.lanes, lambda e: T.buffer_store(base, base[0, e] * beta, [0, e]))

    def read(self, b: Any, h: Any, i: Any) -> None:
        """One query."""
        g = h // self.share
        bg = b * self.G + g
        at, bottom = T.sblock_alloc_buffer((self.tables,), "int32"), scratch(1, 1)
        for n in range(self.tables):
            T.buffer_store(at, self.entry(self.q, [b, h, i], n), [n])
        weight = self.counts[bg, 0, 0, at[0]]
        for n in range(1, self.tables):
            weight = weight + self.counts[bg, 0, n, at[n]]
        T.buffer_store(bottom, at_least(weight, self.eps), [0, 0])

        def out(e: Any) -> None:
            total = self.sums[bg, 0, 0, at[0], e]
            for n in range(1, self.tables):
                total = total + self.sums[bg, 0, n, at[n], e]
            if self.own:
                value = load(self.v, b, g, i, e) * f32(self.beta)
                if self.mask is not None:
                    value = tirx.if_then_else(self.seen(b, i), value, f32(0.0))
                total = total + value
            store(self.out, [b, h, i, e], total / bottom[0, 0])

        self.each(out)


class _Causal(_Shared):
    """Causal, one task for each (batch, key head)."""

    def write(self) -> None:
        old, blind = max(self.S - self.T, 0), max(self.T - self.S, 0)
        with T.parallel(0, self.B * self.G) as bg:
            b, g = bg // self.G, bg % self.G
            self.state, self.z = scratch(self.bits, self.Ep), scratch(self.bits, 1)
            self.held, self.total = scratch(1, self.Ep), scratch(1, self.Ep)
            self.number = scratch(1, 1)
            self._clear()
            if blind:
                with T.grid(self.share, blind, self.E) as (part, i, e):
                    store(self.out, [b, g * self.share + part, i, e], f32(0.0))
            if old:
                with T.serial(0, old) as j:
                    self._absorb(b, g, j)
            with T.serial(0, self.T - blind) as n:
                self._absorb(b, g, n + old)
                with T.serial(0, self.share) as part:
                    self._read(b, g * self.share + part, n + blind)

    def _clear(self) -> None:
        zero = f32(0.0)
        T.buffer_store(self.number, zero, [0, 0])
        vectors(self.Ep, self.lanes, lambda e: T.buffer_store(self.total, zero, [0, e]))
        with T.serial(0, self.bits) as r:
            T.buffer_store(self.z, zero, [r, 0])
            vectors(self.Ep, self.lanes, lambda e: T.buffer_store(self.state, zero, [r, e]))

    def _sign(self, words: Any, at: list[Any], r: Any) -> Any:
        place = r % WORD if self.bits > WORD else r
        return flip(words[(*at, r // WORD)], place)

    def _absorb(self, b: Any, g: Any, j: Any) -> None:
        if self.mask is None:
            self._add(b, g, j)
            return
        with T.If(self.seen(b, j)):
            with T.Then():
                self._add(b, g, j)
            with T.Else():  # its own query reads no value of it
                self.each(lambda e: T.buffer_store(self.held, f32(0.0), [0, e]))

    def _add(self, b: Any, g: Any, j: Any) -> None:
        one = f32(1.0)
        T.buffer_store(self.number, self.number[0, 0] + one, [0, 0])
        self.each(lambda e: T.buffer_store(self.held, load(self.v, b, g, j, e), [0, e]))
        if not self.own:
            self.each(
                lambda e: T.buffer_store(self.total, self.total[0, e] + self.held[0, e], [0, e])
            )
        with T.serial(0, self.bits) as r:
            turn = self._sign(self.k, [b, g, j], r)
            T.buffer_store(self.z, self.z[r, 0] + signed(one, turn), [r, 0])
            self.each(
                lambda e: T.buffer_store(
                    self.state, self.state[r, e] + signed(self.held[0, e], turn), [r, e]
                )
            )

    def _read(self, b: Any, h: Any, i: Any) -> None:
        top, bottom = scratch(1, self.Ep), scratch(1, 1)
        beta = f32(self.beta)
        source = self.held if self.own else self.total
        self.each(lambda e: T.buffer_store(top, source[0, e] * beta, [0, e]))
        T.buffer_store(bottom, self.number[0, 0] * beta, [0, 0])
        with T.serial(0, self.bits) as r:
            turn = self._sign(self.q, [b, h, i], r)
            T.buffer_store(bottom, bottom[0, 0] + signed(self.z[r, 0], turn), [0, 0])
            self.each(
                lambda e: T.buffer_store(top, top[0, e] + signed(self.state[r, e], turn), [0, e])
            )
        T.buffer_store(bottom, at_least(bottom[0, 0], self.eps), [0, 0])
        self.each(lambda e: store(self.out, [b, h, i, e], top[0, e] / bottom[0, 0]))


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a hamming attention made by the kit, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    kind = _Causal if facts["causal"] else Tables
    return tvm.s_tir.Schedule(build(func, lambda *args: kind(facts, target.lanes, args).write()))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
