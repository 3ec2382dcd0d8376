"""Products with binary codes: w = scale_n sum_r alpha_kr b_r, b = +-1.

What codes stand for: passes/linear_forms/_binary.py. Words as in codegen/kernels/coded.py; bit r of
a code says that b_r is +1. For one row the inputs are multiplied by the alphas once (``binary_x``),
and a product is a sum of those under signs (``binary_add_*``): no multiplication for a weight. For
a few rows the weights are made in registers and multiplied (``binary_fma_*``); for more they are
made once, a panel at a time.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from codegen.kernels.coded import code_of, has_tables, made_product, padded, u32
from codegen.kernels.dense import dense_made, panel_width
from codegen.target import Target
from passes.linear_forms._coded_ops import FEW
from passes.linear_forms._codes import PANEL, CodeSpec

WEIGHT = "binary_weight"
_FEW_MADE = 4  # as FEW, where weights are made by their bits: 8 rows take thrice a panel's time


def signed_sum(spec: CodeSpec, part: Any, code: Any) -> Any:
    """sum_r of part(r), turned where bit r of the code is not set."""
    total = None
    for r in range(spec.bits):
        sign = (~(code >> u32(r)) if r else ~code) << u32(31)
        bits = tirx.reinterpret("uint32", part(r)) ^ sign
        one = tirx.reinterpret("float32", bits)
        total = one if total is None else total + one
    return total


def binary(
    x: Any, words: Any, scale: Any, alpha: Any, bias: Any, spec: CodeSpec, target: Target
) -> Any:
    """x [.., T, K] times the weight (and bias) -> [.., T, N]."""
    columns, lead = int(scale.shape[0]), [int(d) for d in x.shape[:-1]]
    if target.kind == "gpu":
        total = made_product(x, lambda k, n: _weight(words, alpha, spec, k, n), columns)
    elif len(lead) == 1 and lead[0] <= (FEW if has_tables(target) else _FEW_MADE):
        total = (_one if lead[0] == 1 else _few)(x, words, alpha, spec)
    else:
        total = _many(x, words, alpha, spec, columns, target)

    def value(*i: Any) -> Any:
        scaled = total(*i) * scale[i[-1]]
        return scaled if bias is None else scaled + bias[i[-1]]

    return te.compute((*lead, columns), value, name="coded_out")


def _one(x: Any, words: Any, alpha: Any, spec: CodeSpec) -> Any:
    rows, depth = (int(d) for d in x.shape)
    panels, groups, _ = (int(d) for d in words.shape)
    zero = tirx.const(0, "float32")
    parts = te.compute(
        (rows, groups * spec.per, spec.bits),
        lambda row, k, r: tirx.if_then_else(k < depth, x[row, k] * alpha[k, r], zero),
        name="binary_x",
    )
    g, i = te.reduce_axis((0, groups), name="g"), te.reduce_axis((0, spec.per), name="i")

    def value(row: Any, n: Any) -> Any:
        code = code_of(spec, words[n // PANEL, g, n % PANEL], i)
        return te.sum(
            signed_sum(spec, lambda r: parts[row, g * spec.per + i, r], code), axis=[g, i]
        )

    return te.compute((rows, panels * PANEL), value, name=f"binary_add_{spec.key}")


def _few(x: Any, words: Any, alpha: Any, spec: CodeSpec) -> Any:
    rows, depth = (int(d) for d in x.shape)
    panels, groups, _ = (int(d) for d in words.shape)
    whole, zero = groups * spec.per, tirx.const(0, "float32")
    if whole != depth:
        x, known = padded(x, whole), alpha
        alpha = te.compute(
            (whole, spec.bits),
            lambda k, r: tirx.if_then_else(k < depth, known[k, r], zero),
            name="binary_alpha",
        )

    def element(g: Any, i: Any, n: Any) -> Any:
        code = code_of(spec, words[n // PANEL, g, n % PANEL], i)
        return signed_sum(spec, lambda r: alpha[g * spec.per + i, r], code)

    weight = te.compute((groups, spec.per, panels * PANEL), element, name=WEIGHT)
    g, i = te.reduce_axis((0, groups), name="g"), te.reduce_axis((0, spec.per), name="i")
    return te.compute(
        (rows, panels * PANEL),
        lambda r, n: te.sum(x[r, g * spec.per + i] * weight[g, i, n], axis=[g, i]),
        name=f"binary_fma_{spec.key}",
    )


def _many(x: Any, words: Any, alpha: Any, spec: CodeSpec, columns: int, target: Target) -> Any:
    depth, width = int(x.shape[-1]), panel_width(target)

    def element(p: Any, k: Any, j: Any) -> Any:
        return _weight(words, alpha, spec, k, p * width + j)

    return dense_made(x, (-(-columns // width), depth, width), element, columns, target)


def _weight(words: Any, alpha: Any, spec: CodeSpec, k: Any, n: Any) -> Any:
    """The weight of input k for column n, without the scale."""
    code = code_of(spec, words[n // PANEL, k // spec.per, n % PANEL], k % spec.per)
    return signed_sum(spec, lambda r: alpha[k, r], code)
