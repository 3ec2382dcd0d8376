"""Rule ``sign_codes``: channels of normalised rows against a threshold, packed into words."""

from __future__ import annotations

from typing import Any

import tvm.s_tir
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.hamming import TINY, WORD, u32
from codegen.kernels.tiles import build, imin, load, reduce_row, scratch, vectors
from codegen.kernels.vector_math import at_least, f32
from codegen.rule import Rule
from codegen.target import Target

NAME = "sign_codes"
ROWS = 64  # rows of one parallel task


def _write(lanes: int, x: Any, threshold: Any, out: Any) -> None:
    batch, heads, tokens, width = (int(n) for n in x.shape)
    share, words = heads // int(threshold.shape[0]), int(out.shape[3])
    tasks = -(-tokens // ROWS)
    with T.parallel(0, batch * heads * tasks) as n:
        bh, first = n // tasks, (n % tasks) * ROWS
        b, h = bh // heads, bh % heads
        scale = scratch(1, 1)
        marks = T.sblock_alloc_buffer((width,), "uint32")
        word = T.sblock_alloc_buffer((1,), "uint32")
        with T.serial(0, imin(ROWS, tokens - first)) as i:
            row = first + i
            square = reduce_row(
                width,
                lanes,
                lambda d: load(x, b, h, row, d) * load(x, b, h, row, d),
                lambda p, q: p + q,
                0.0,
            )
            T.buffer_store(scale, f32(1.0) / at_least(tirx.sqrt(square), TINY), [0, 0])

            def mark(d: Any) -> None:
                above = load(x, b, h, row, d) * scale[0, 0] > threshold[h // share]
                one = u32(1) << tirx.Cast("uint32", d % WORD)
                T.buffer_store(marks, tirx.Select(above, one, u32(0)), [d])

            vectors(width, lanes, mark)
            for w in range(words):
                T.buffer_store(word, u32(0), [0])
                with T.serial(0, min(WORD, width - w * WORD)) as r:
                    T.buffer_store(word, word[0] | marks[w * WORD + r], [0])
                T.buffer_store(out, word[0], [b, h, row, w])


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of sign codes made by the kit, None for anything else."""
    if facts_of(func, NAME) is None:
        return None
    return tvm.s_tir.Schedule(build(func, lambda *args: _write(target.lanes, *args)))


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
