"""Definition of attention over packed codes with a table of weights by a count of bits.

Plain TE, the meaning that is counted; never run as it is on a processor. Words as in
codegen/kernels/hamming.py. The count of a pair is popcount(q xor k), the Hamming distance, or
popcount(q and k). The table [H, b + 1] holds logarithms (passes/forms/_table.py). Blocks start
with ``tab_``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tvm import te, tirx

from codegen.kernels.attention import wide
from codegen.kernels.vector_math import f32
from passes.forms._table import LOWEST, TINY


@dataclass(frozen=True)
class TableFacts:
    """What the tensors do not say. Inputs are cq, ck, v, table, then mask and conv if present.

    `common` counts the bits both codes have; `taps` is the length of the convolution conv [G, taps]
    over the values around a token that is added to the output (0: none).
    """

    bits: int
    common: bool = False
    causal: bool = False
    masked: bool = False
    taps: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def split(self, rest: tuple[Any, ...]) -> tuple[Any, Any]:
        """(key mask or None, conv or None) out of the inputs after the table."""
        mask = rest[0] if self.masked else None
        return mask, rest[-1] if self.taps else None

    def pair(self, a: Any, b: Any) -> Any:
        """The bits that count, of two words."""
        return a & b if self.common else a ^ b


def define(facts: TableFacts, cq: Any, ck: Any, v: Any, table: Any, *rest: Any) -> Any:
    """[B, H, T, E]: cq [B, H, T, W], ck [B, G, S, W] uint32, v [B, G, S, E], table [H, b + 1],
    mask [B or 1, S] bool, conv [G, taps]."""
    b_, h_, t_, words = (int(n) for n in cq.shape)
    g_, s_, e_ = (int(n) for n in v.shape[1:])
    mask, conv = facts.split(rest)
    share, offset, dtype = h_ // g_, s_ - t_, str(v.dtype)
    weigh = _entries(facts, table)
    number = _counts(facts, cq, ck, (b_, h_, t_, s_), share, words)

    def seen(b: Any, i: Any, j: Any) -> list[Any]:
        tests = [mask[0 if int(mask.shape[0]) == 1 else b, j]] if facts.masked else []
        return [*tests, j <= i + offset] if facts.causal else tests

    def weight(b: Any, h: Any, i: Any, j: Any) -> Any:
        found, tests = weigh[h, number(b, h, i, j).astype("int32")], seen(b, i, j)
        return tirx.Select(tirx.all(*tests), found, f32(0.0)) if tests else found

    w = te.compute((b_, h_, t_, s_), weight, name="tab_weight")
    j0, j1 = (te.reduce_axis((0, s_), name=f"j{n}") for n in range(2))

    def value(b: Any, g: Any, j: Any, e: Any) -> Any:
        held = wide(v[b, g, j, e], dtype)
        if not facts.masked:
            return held
        return tirx.if_then_else(mask[0 if int(mask.shape[0]) == 1 else b, j], held, f32(0.0))

    top = te.compute(
        (b_, h_, t_, e_),
        lambda b, h, i, e: te.sum(w[b, h, i, j0] * value(b, h // share, j0, e), axis=j0),
        name="tab_values",
    )
    bottom = te.compute(
        (b_, h_, t_), lambda b, h, i: te.sum(w[b, h, i, j1], axis=j1), name="tab_sum"
    )
    safe = te.compute(bottom.shape, lambda *i: tirx.max(bottom(*i), f32(TINY)), name="tab_safe")
    near = None if conv is None else _around(facts, conv, value, (b_, h_, t_, e_), share)

    def out(b: Any, h: Any, i: Any, e: Any) -> Any:
        made = top[b, h, i, e] / safe[b, h, i]
        return (made if near is None else made + near[b, h, i, e]).astype(dtype)

    return te.compute((b_, h_, t_, e_), out, name="tab_out")


def _entries(facts: TableFacts, table: Any) -> Any:
    """The weights [H, b + 1], the largest of a head being 1."""
    n = te.reduce_axis((0, facts.bits + 1), name="n")
    most = te.compute(
        (int(table.shape[0]),), lambda h: te.max(table[h, n], axis=n), name="tab_most"
    )
    return te.compute(
        table.shape,
        lambda h, n: tirx.exp(tirx.max(table[h, n] - most[h], f32(LOWEST))),
        name="tab_entry",
    )


def _counts(
    facts: TableFacts, cq: Any, ck: Any, shape: tuple[int, ...], share: int, words: int
) -> Any:
    """The counts of all pairs, uint32."""
    if words == 1:
        return te.compute(
            shape,
            lambda b, h, i, j: tirx.popcount(facts.pair(cq[b, h, i, 0], ck[b, h // share, j, 0])),
            name="tab_count",
        )
    w = te.reduce_axis((0, words), name="w")
    return te.compute(
        shape,
        lambda b, h, i, j: te.sum(
            tirx.popcount(facts.pair(cq[b, h, i, w], ck[b, h // share, j, w])), axis=w
        ),
        name="tab_count",
    )


def _around(facts: TableFacts, conv: Any, value: Any, shape: tuple[int, ...], share: int) -> Any:
    """sum_t conv[g, t] v[i + t - taps / 2]; what lies outside counts nothing."""
    tokens, t = shape[2], te.reduce_axis((0, facts.taps), name="t")

    def near(b: Any, h: Any, i: Any, e: Any) -> Any:
        j = i + t - facts.taps // 2
        inside = tirx.all(j >= 0, j < tokens)
        held = tirx.if_then_else(inside, value(b, h // share, j, e), f32(0.0))
        return te.sum(conv[h // share, t] * held, axis=t)

    return te.compute(shape, near, name="tab_around")
