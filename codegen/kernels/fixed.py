"""Shift layers in int32 fixed point: what passes/linear_forms/_fixed.py says, in TE.

Between ``fixed_in`` and ``fixed_float`` everything is an integer: the codes of a word are shifted
out, an activation is shifted by what its code says, its sign is turned by an exclusive or and a
subtraction, and the sum is shifted once for each output.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from codegen.kernels.coded import Term, code_of, terms_of, u32
from passes.linear_forms._codes import PANEL, CodeSpec
from passes.linear_forms._fixed import row_tile


def i32(value: int) -> Any:
    """An int32 constant expression."""
    return tirx.const(value, "int32")


def to_fixed(x: Any, limit: Any, fraction: int) -> Any:
    """x float32 as int32 of 2^-fraction, rounded down, within limit [1]; NaN is 0."""
    steps, zero = tirx.const(2.0**fraction, "float32"), tirx.const(0.0, "float32")

    def value(*i: Any) -> Any:
        most, least = (tirx.Cast("float32", n) for n in (limit[0], i32(0) - limit[0]))
        whole = tirx.floor(tirx.Select(tirx.isnan(x(*i)), zero, x(*i)) * steps)
        return tirx.Cast("int32", tirx.max(tirx.min(whole, most), least))

    return te.compute(x.shape, value, name="fixed_in")


def to_float(y: Any, fraction: int) -> Any:
    """y int32 of 2^-fraction as float32."""
    step = tirx.const(2.0**-fraction, "float32")
    return te.compute(y.shape, lambda *i: tirx.Cast("float32", y(*i)) * step, name="fixed_float")


def fixed(x: Any, words: Any, base: Any, offset: Any, spec: CodeSpec) -> Any:
    """x int32 [R, K] times codes (words int32 [P, G, 32]) -> int32 [R, N], N of base and offset."""
    rows, depth = (int(d) for d in x.shape)
    panels, groups, _ = (int(d) for d in words.shape)
    tile, columns = row_tile(rows), int(base.shape[0])
    whole = -(-rows // tile) * tile
    source = te.compute(
        (whole, groups * spec.per),
        lambda r, k: tirx.if_then_else(k < depth, x[tirx.min(r, rows - 1), k], i32(0)),
        name="fixed_x",
    )
    g, i = te.reduce_axis((0, groups), name="g"), te.reduce_axis((0, spec.per), name="i")
    total = te.compute(
        (whole, panels * PANEL),
        lambda r, n: te.sum(
            _product(
                spec, source[r, g * spec.per + i], code_of(spec, words[n // PANEL, g, n % PANEL], i)
            ),
            axis=[g, i],
        ),
        name=f"fixed_add_{spec.key}",
    )

    def out(r: Any, n: Any) -> Any:
        down = total[r, n] >> (i32(0) - base[n])
        moved = tirx.Select(base[n] < i32(0), down, total[r, n] << base[n])
        return moved + offset[n]

    return te.compute((rows, columns), out, name="fixed_out")


def _product(spec: CodeSpec, x: Any, code: Any) -> Any:
    """x shifted and signed by a code: int32."""
    total = None
    for term in terms_of(spec):
        one = _shifted(x, term, code)
        total = one if total is None else total + one
    turn = i32(0) - tirx.reinterpret("int32", (code >> u32(spec.bits - 1)) & u32(1))
    return (total ^ turn) - turn


def _shifted(x: Any, term: Term, code: Any) -> Any:
    field = term.field(code)
    down = tirx.reinterpret("int32", u32(term.top) - term.exponent(field))
    return tirx.Select(field.equal(u32(0)), i32(0), x >> down)
