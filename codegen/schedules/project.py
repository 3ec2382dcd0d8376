"""Rule ``project``: per-head products x [B, H, T, D] by w [H, D, R] in register tiles."""

from __future__ import annotations

from typing import Any

import tvm.s_tir
from tvm.tirx.script.builder import ir as T

from codegen.kernels.attention import facts_of
from codegen.kernels.tiles import (
    ROWS,
    build,
    imin,
    load,
    panels,
    scratch,
    store,
    tile,
    up,
    vectors,
)
from codegen.kernels.vector_math import f32
from codegen.rule import Rule
from codegen.target import Target

NAME = "project"


def _write(scale: float, lanes: int, x: Any, w: Any, out: Any) -> None:
    batch, heads, tokens, d_ = (int(n) for n in x.shape)
    r_ = int(w.shape[2])
    padded, rows = up(r_, lanes), min(ROWS, tokens)
    wp = w
    if r_ % lanes or str(w.dtype) != "float32":
        wp = scratch(heads, d_, padded)
        with T.parallel(0, heads * d_) as n, T.serial(0, padded) as r:
            T.buffer_store(wp, load(w, n // d_, n % d_, imin(r, r_ - 1)), [n // d_, n % d_, r])
    tiles = -(-tokens // rows)
    with T.parallel(0, batch * heads * tiles) as n:
        bh, row = n // tiles, (n % tiles) * rows
        b, h = bh // heads, bh % heads
        ot = scratch(rows, padded)
        for r0, width in panels(r_, lanes):
            tile(
                lambda i, d: load(x, b, h, imin(row + i, tokens - 1), d),
                lambda d, r, r0=r0: wp[h, d, r0 + r],  # type: ignore[misc]
                d_,
                lambda i, r, s, r0=r0: T.buffer_store(  # type: ignore[misc]
                    ot, s if scale == 1.0 else s * f32(scale), [i, r0 + r]
                ),
                rows=rows,
                width=width,
            )
        with T.serial(0, rows) as i, T.If(row + i < tokens), T.Then():
            vectors(r_, lanes, lambda r: store(out, [b, h, row + i, r], ot[i, r]))


def apply(func: Any, target: Target) -> Any | None:
    """The scheduled kernel of a projection made by the kit, None for anything else."""
    facts = facts_of(func, NAME)
    if facts is None:
        return None
    body = build(func, lambda x, w, out: _write(float(facts["scale"]), target.lanes, x, w, out))
    return tvm.s_tir.Schedule(body)


RULE = Rule(NAME, apply, kinds=("cpu", "edge"), order=10)
