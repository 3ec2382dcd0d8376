"""Pairs of bfloat16 values for kernels written by hand: conversion, products, powers of two.

Two neighbours of the summed axis make one int32 (the first in its low half), as vdpbf16ps takes
them; TVM's own bfloat16 type would be widened. All vectors are 512 bits wide. Functions are LLVM
code that the kernel's first parallel loop imports (`imported`) and that is inlined.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels.tiles import scratch
from codegen.kernels.vector_math import f32
from codegen.schedules._dot import BF16_DOT, IMPORT, bf16_code
from codegen.target import Target

LANES = 16
CHUNK = 2 * LANES  # floats that become one vector of pairs
# 2^r for 0 <= r < 1, relative error 7.5e-5: a fiftieth of what rounding to bfloat16 costs.
_EXP2 = (0.07802455105595144, 0.226067142764381, 0.6958335281057402, 0.9999252185482511)
_FLOOR = 9  # of vreduceps: what is left above the next whole number below; no exceptions
_F, _I, _B = f"<{LANES} x float>", f"<{LANES} x i32>", f"<{2 * LANES} x bfloat>"
_PACK, _WEAVE, _POWER = "rewriter_pack_bf16", "rewriter_weave_bf16", "rewriter_exp2"
_POWERS = "rewriter_exp2_bf16"


def has_pairs(target: Target) -> bool:
    """Whether the processor multiplies pairs of bfloat16 at twice the rate of float32."""
    wide = target.kind == "cpu" and target.lanes == LANES
    return wide and "avx512_bf16" in target.features and target.options.get("bf16") != "widen"


def imported(target: Target) -> dict[str, str]:
    """For the first parallel loop of a kernel that uses the functions below."""
    return {IMPORT: bf16_code(target) + _code(target)}


def scratch_pairs(*shape: int) -> Any:
    """A buffer of pairs, private to the innermost loop that holds all its uses (not filled)."""
    return T.sblock_alloc_buffer(shape, "int32")


def pack(low: Any, high: Any) -> Any:
    """Sixteen pairs of 32 floats in their order: those of `low`, then those of `high`."""
    return tirx.call_pure_extern(f"int32x{LANES}", _PACK, low, high)


def weave(first: Any, second: Any) -> Any:
    """Sixteen pairs, each of one float of `first` and the one of `second` in the same lane."""
    return tirx.call_pure_extern(f"int32x{LANES}", _WEAVE, first, second)


def powers(low: Any, high: Any) -> Any:
    """`pack` of two to the power of the floats; 0 for -inf, NaN kept."""
    return tirx.call_pure_extern(f"int32x{LANES}", _POWERS, low, high)


def dot(total: Any, a: Any, b: Any) -> Any:
    """total + the products of both parts of each pair: float32x16, int32x16, int32x16."""
    return tirx.call_pure_extern(f"float32x{LANES}", BF16_DOT, total, a, b)


def ones() -> Any:
    """Pairs of 1.0."""
    return tirx.Broadcast(tirx.const(0x3F803F80, "int32"), LANES)


def floats(buffer: Any, *index: Any) -> Any:
    """A vector of a float32 buffer."""
    return buffer.vload(list(index), f"float32x{LANES}")


def pairs(buffer: Any, *index: Any) -> Any:
    """A vector of a buffer of pairs."""
    return buffer.vload(list(index), f"int32x{LANES}")


def put(buffer: Any, index: list[Any], vector: Any) -> None:
    """Store a vector from `index` on."""
    *lead, last = index
    T.buffer_store(buffer, vector, [*lead, tirx.Ramp(last, 1, LANES)])


def zero(buffer: Any, rows: int, width: int) -> None:
    """Zeros in a float32 buffer of `rows` rows of whole vectors."""
    for i in range(rows):
        for x in range(0, width, LANES):
            put(buffer, [i, x], tirx.Broadcast(f32(0.0), LANES))


def pair_tile(
    a: Callable[[int, Any], Any],
    b: Callable[[Any, int], Any],
    number: Any,
    *,
    rows: int,
    width: int,
    start: Callable[[int], Any] | None = None,
) -> list[Any]:
    """Vectors of columns [rows, 16], float32 in registers: start(i) + sum_k a(i, k) . b(k, x).

    a(i, k) is one pair, b(k, x) a vector of them, for columns x to x + 15; k < `number` pairs.
    One buffer would be too large for TVM to put it on the stack, and vectors of any other length
    would make LLVM take those of this length apart.
    """
    acc = [scratch(rows, LANES) for _ in range(0, width, LANES)]
    for i in range(rows):
        first = tirx.Broadcast(f32(0.0) if start is None else start(i), LANES)
        for column in acc:
            put(column, [i, 0], first)
    with T.serial(0, number) as k:
        for i in range(rows):
            pair = tirx.Broadcast(a(i, k), LANES)
            for n, column in enumerate(acc):
                put(column, [i, 0], dot(floats(column, i, 0), pair, b(k, n * LANES)))
    return acc


def _code(target: Target) -> str:
    """LLVM code of `pack`, `weave` and `powers`."""
    mattr = ",".join(target.tvm.get("mattr", ()))
    p = [_spread(c) for c in _EXP2]
    one, two = "llvm.x86.avx512bf16.cvtneps2bf16.512", "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
    reduce, scale = "llvm.x86.avx512.mask.reduce.ps.512", "llvm.x86.avx512.mask.scalef.ps.512"
    fma, half = f"{_F} @llvm.fma.v{LANES}f32", f"<{LANES} x bfloat>"
    return f"""
declare {half} @{one}({_F})
declare {_B} @{two}({_F}, {_F})
declare {_F} @{reduce}({_F}, i32, {_F}, i16, i32)
declare {_F} @{scale}({_F}, {_F}, {_F}, i16, i32)
declare {fma}({_F}, {_F}, {_F})
define {_I} @{_PACK}({_F} %low, {_F} %high) #1 {{
  %b = call {_B} @{two}({_F} %high, {_F} %low)
  %r = bitcast {_B} %b to {_I}
  ret {_I} %r
}}
define {_I} @{_WEAVE}({_F} %first, {_F} %second) #1 {{
  %a = call {half} @{one}({_F} %first)
  %b = call {half} @{one}({_F} %second)
  %c = bitcast {half} %a to <{LANES} x i16>
  %d = bitcast {half} %b to <{LANES} x i16>
  %e = zext <{LANES} x i16> %c to {_I}
  %f = zext <{LANES} x i16> %d to {_I}
  %g = shl {_I} %f, splat (i32 16)
  %r = or {_I} %e, %g
  ret {_I} %r
}}
define {_F} @{_POWER}({_F} %x) #1 {{
  %f = call {_F} @{reduce}({_F} %x, i32 {_FLOOR}, {_F} zeroinitializer, i16 -1, i32 4)
  %a = call {fma}({_F} {p[0]}, {_F} %f, {_F} {p[1]})
  %b = call {fma}({_F} %a, {_F} %f, {_F} {p[2]})
  %c = call {fma}({_F} %b, {_F} %f, {_F} {p[3]})
  %r = call {_F} @{scale}({_F} %c, {_F} %x, {_F} zeroinitializer, i16 -1, i32 4)
  ret {_F} %r
}}
define {_I} @{_POWERS}({_F} %low, {_F} %high) #1 {{
  %a = call {_F} @{_POWER}({_F} %low)
  %b = call {_F} @{_POWER}({_F} %high)
  %r = call {_I} @{_PACK}({_F} %a, {_F} %b)
  ret {_I} %r
}}
attributes #1 = {{ alwaysinline nounwind "target-cpu"="{target.tvm["mcpu"]}" \
"target-features"="{mattr}" }}
"""


def _spread(value: float) -> str:
    """A float32 constant in all lanes, as LLVM writes it."""
    (single,) = struct.unpack("f", struct.pack("f", value))
    return f"splat (float 0x{struct.pack('>d', single).hex().upper()})"
