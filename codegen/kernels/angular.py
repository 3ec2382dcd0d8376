"""Definitions of linear-angular attention over {0, 1} codes, and of codes by thresholds.

Plain loops, the meaning that is counted; never run as they are. Words as in
codegen/kernels/hamming.py. Blocks start with ``sign_`` and ``ang_``.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import te, tirx

from codegen.kernels.attention import wide
from codegen.kernels.hamming import TINY, WORD, pack, u32
from codegen.kernels.vector_math import f32


def sign_codes(x: Any, threshold: Any) -> Any:
    """Bits x / |x| > threshold of rows x [B, H, T, D], threshold [G]: words [B, H, T, W]."""
    b_, h_, t_, d_ = (int(n) for n in x.shape)
    share, dtype, rows = h_ // int(threshold.shape[0]), str(x.dtype), (b_, h_, t_)
    d = te.reduce_axis((0, d_), name="d")

    def value(*i: Any) -> Any:
        return wide(x(*i), dtype)

    length = te.compute(
        rows, lambda *i: te.sum(value(*i, d) * value(*i, d), axis=d), name="sign_length"
    )
    scale = te.compute(
        rows,
        lambda *i: f32(1.0) / tirx.max(tirx.sqrt(length(*i)), f32(TINY)),
        name="sign_scale",
    )
    unit = te.compute(x.shape, lambda *i: value(*i) * scale(*i[:-1]), name="sign_unit")
    return pack(unit, d_, lambda *i: threshold[i[1] // share])


def define(facts: dict[str, Any], cq: Any, ck: Any, v: Any, conv: Any, key_mask: Any = None) -> Any:
    """y / |y| + DW(v), y = v / 2 + c_q (c_k^T v) / pi: [B, H, T, E] for T = S.

    Words cq [B, H, T, W], ck [B, G, S, W], v [B, G, S, E], conv [G, taps], mask [B or 1, S].
    """
    b_, h_, t_ = (int(n) for n in cq.shape[:3])
    g_, s_, e_ = (int(n) for n in v.shape[1:])
    bits, share, taps, dtype = int(facts["bits"]), h_ // g_, int(conv.shape[1]), str(v.dtype)
    one = key_mask is not None and int(key_mask.shape[0]) == 1
    on_k, on_q = _bits(ck, bits, "ang_keys"), _bits(cq, bits, "ang_queries")

    def held(b: Any, g: Any, j: Any, e: Any) -> Any:
        return wide(v[b, g, j, e], dtype)

    if key_mask is not None:
        held = te.compute(
            v.shape,
            lambda b, g, j, e: tirx.Select(
                key_mask[0 if one else b, j], wide(v[b, g, j, e], dtype), f32(0.0)
            ),
            name="ang_seen",
        )
    j, r = te.reduce_axis((0, s_), name="j"), te.reduce_axis((0, bits), name="r")
    state = te.compute(
        (b_, g_, bits, e_),
        lambda b, g, r, e: te.sum(
            tirx.Select(on_k[b, g, j, r] == u32(1), held(b, g, j, e), f32(0.0)), axis=j
        ),
        name="ang_state",
    )
    read = te.compute(
        (b_, h_, t_, e_),
        lambda b, h, i, e: te.sum(
            tirx.Select(on_q[b, h, i, r] == u32(1), state[b, h // share, r, e], f32(0.0)), axis=r
        ),
        name="ang_read",
    )
    y = te.compute(
        (b_, h_, t_, e_),
        lambda b, h, i, e: (
            read[b, h, i, e] * f32(1 / math.pi) + held(b, h // share, i, e) * f32(0.5)
        ),
        name="ang_sum",
    )
    f, t = te.reduce_axis((0, e_), name="f"), te.reduce_axis((0, taps), name="t")
    square = te.compute(
        (b_, h_, t_), lambda *i: te.sum(y(*i, f) * y(*i, f), axis=f), name="ang_square"
    )
    inverse = te.compute(
        (b_, h_, t_),
        lambda *i: f32(1.0) / tirx.max(tirx.sqrt(square(*i)), f32(TINY)),
        name="ang_inverse",
    )

    def near(b: Any, g: Any, i: Any, e: Any) -> Any:
        inside = tirx.all(i >= 0, i < s_)
        return tirx.if_then_else(inside, held(b, g, i, e), f32(0.0))

    around = te.compute(
        (b_, h_, t_, e_),
        lambda b, h, i, e: te.sum(
            conv[h // share, t] * near(b, h // share, _shifted(i, t, taps), e), axis=t
        ),
        name="ang_around",
    )
    return te.compute(
        (b_, h_, t_, e_),
        lambda b, h, i, e: (y[b, h, i, e] * inverse[b, h, i] + around[b, h, i, e]).astype(dtype),
        name="ang_out",
    )


def _shifted(i: Any, t: Any, taps: int) -> Any:
    return i + t - taps // 2


def _bits(words: Any, bits: int, name: str) -> Any:
    def bit(b: Any, h: Any, i: Any, r: Any) -> Any:
        place = r % WORD if bits > WORD else r
        shifted = words[b, h, i, r // WORD] >> tirx.Cast("uint32", place)
        return shifted & u32(1)

    return te.compute((*words.shape[:3], bits), bit, name=name)
