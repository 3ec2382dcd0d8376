"""Products with weights kept as codes of a few bits: words int32 [P, G, PANEL], several codes each.

Word (p, g, j) holds the codes of column ``p * PANEL + j`` for the inputs ``g * per .. g * per +
per - 1``, the first in its lowest bits. A code is a sign (its highest bit) and a magnitude: 0, or a
power of two (`terms` 1), or a sum of two (`terms` 2: two fields of two bits). The value of a column
is the sum times ``scale`` (a power of two per column).

One row: the product with a weight is made by adding to the exponent of the input
(``coded_add_*``), no multiplication; a processor with AVX-512 does it by a multiply-add, which
takes it less time (codegen/schedules/_coded.py). A few rows: the weight is made by its bits and
multiplied (``coded_fma_*``), which shares that work between the rows. Many rows: a panel of weights
is made once into a buffer, and the product is a dense one (codegen/kernels/dense.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from codegen.kernels.dense import dense_made, panel_width
from codegen.target import Target
from passes.linear_forms._coded_ops import FEW
from passes.linear_forms._codes import PANEL, CodeSpec

NAN = 0x7FC00000
LANES = 16  # of a vector whose codes are looked up in registers


def has_tables(target: Target) -> bool:
    """Whether the target looks codes up in registers (codegen/schedules/_coded.py)."""
    return target.lanes == LANES and "avx512f" in target.features


def u32(value: int) -> Any:
    """A constant; signed ones would become int64 with the indices, when Relax makes the kernel."""
    return tirx.const(value, "uint32")


@dataclass(frozen=True)
class Term:
    """One power of two of a code: field ``(code >> at) & mask``, exponent (field << up) - top."""

    at: int
    mask: int
    up: int
    top: int

    def field(self, code: Any) -> Any:
        """The field of a code."""
        return (code >> u32(self.at) if self.at else code) & u32(self.mask)

    def exponent(self, field: Any) -> Any:
        """`field` in steps of the exponent, without `top`."""
        return field << u32(self.up) if self.up else field


def terms_of(spec: CodeSpec) -> tuple[Term, ...]:
    """How the exponents of a code's terms follow from its bits."""
    if spec.terms == 1:
        most = (1 << (spec.bits - 1)) - 1
        return (Term(0, most, 0, most),)
    return (Term(2, 3, 1, 6), Term(0, 3, 1, 7))


def code_of(spec: CodeSpec, word: Any, i: Any) -> Any:
    """Code `i` of a word, with what lies above it."""
    return tirx.reinterpret("uint32", word) >> (i * spec.bits).astype("uint32")


def weight_of(spec: CodeSpec, code: Any) -> Any:
    """The float32 value of a code, made of its bits."""
    total = None
    for term in terms_of(spec):
        field = term.field(code)
        bits = (term.exponent(field) + u32(127 - term.top)) << u32(23)
        one = tirx.reinterpret("float32", tirx.Select(field.equal(u32(0)), u32(0), bits))
        total = one if total is None else total + one
    return _signed(spec, total, code)


def product_of(spec: CodeSpec, x: Any, code: Any) -> Any:
    """x times the value of a code, by adding to the exponent of x.

    What is smaller than the smallest normal number becomes 0; infinities and NaN stay, and a code
    of 0 turns them into NaN.
    """
    total = None
    for term in terms_of(spec):
        field = term.field(code)
        one = _shifted(x, field, term)
        total = one if total is None else total + one
    return _signed(spec, total, code)


def _shifted(x: Any, field: Any, term: Term) -> Any:
    bits = tirx.reinterpret("uint32", x)
    exponent = (bits >> u32(23)) & u32(255)
    up = term.exponent(field)
    down = u32(term.top) - up
    none = field.equal(u32(0))
    moved = tirx.Select(u32(term.top) < exponent + up, bits - (down << u32(23)), u32(0))
    finite = tirx.Select(none, u32(0), moved)
    special = tirx.Select(none, u32(NAN), bits)
    return tirx.reinterpret("float32", tirx.Select(exponent.equal(u32(255)), special, finite))


def _signed(spec: CodeSpec, value: Any, code: Any) -> Any:
    sign = ((code >> u32(spec.bits - 1)) & u32(1)) << u32(31)
    return tirx.reinterpret("float32", tirx.reinterpret("uint32", value) ^ sign)


def few_rows(x: Any, words: Any, spec: CodeSpec) -> Any:
    """x [R, K] times codes -> [R, P * PANEL] without the scale."""
    rows, depth = (int(d) for d in x.shape)
    panels, groups, _ = (int(d) for d in words.shape)
    kind = "add" if rows == 1 else "fma"
    source = x if groups * spec.per == depth else padded(x, groups * spec.per)
    g, i = te.reduce_axis((0, groups), name="g"), te.reduce_axis((0, spec.per), name="i")

    def value(r: Any, n: Any) -> Any:
        word, row = words[n // PANEL, g, n % PANEL], source[r, g * spec.per + i]
        code = code_of(spec, word, i)
        if kind == "add":
            return te.sum(product_of(spec, row, code), axis=[g, i])
        return te.sum(row * weight_of(spec, code), axis=[g, i])

    name = f"coded_{kind}_{spec.key}"
    return te.compute((rows, panels * PANEL), value, name=name)


def padded(x: Any, depth: int) -> Any:
    """x [R, K] with zeros up to `depth` inputs."""
    rows, known = (int(d) for d in x.shape)

    def value(r: Any, k: Any) -> Any:
        return tirx.if_then_else(k < known, x[r, k], tirx.const(0, "float32"))

    return te.compute((rows, depth), value, name="coded_x")


def many_rows(x: Any, words: Any, spec: CodeSpec, columns: int, target: Target) -> Any:
    """x [.., T, K] times codes -> [.., T, columns] without the scale."""
    depth, width = int(x.shape[-1]), panel_width(target)
    shape = (-(-columns // width), depth, width)

    def element(p: Any, k: Any, j: Any) -> Any:
        return _weight(words, spec, k, p * width + j)

    return dense_made(x, shape, element, columns, target)


def _weight(words: Any, spec: CodeSpec, k: Any, n: Any) -> Any:
    """The weight of input k for column n."""
    word = words[n // PANEL, k // spec.per, n % PANEL]
    return weight_of(spec, code_of(spec, word, k % spec.per))


def made_product(x: Any, element: Any, columns: int) -> Any:
    """x [R, K] times the weight element(k, n) -> [R, columns], for rule ``gpu_coded``."""
    rows, depth = (int(d) for d in x.shape)
    weight = te.compute((depth, columns), element, name="coded_weight")
    k = te.reduce_axis((0, depth), name="k")
    return te.compute(
        (rows, columns),
        lambda r, n: te.sum(x[r, k] * weight[k, n], axis=k),
        name="coded_product",
    )


def coded(x: Any, words: Any, scale: Any, bias: Any, spec: CodeSpec, target: Target) -> Any:
    """x [.., T, K] times the coded weight (and bias) -> [.., T, N]; [R, K] for a few rows."""
    columns, lead = int(scale.shape[0]), [int(d) for d in x.shape[:-1]]
    few = len(lead) == 1 and lead[0] <= FEW
    if target.kind == "gpu":
        total = made_product(x, lambda k, n: _weight(words, spec, k, n), columns)
    else:
        total = few_rows(x, words, spec) if few else many_rows(x, words, spec, columns, target)

    def value(*i: Any) -> Any:
        scaled = total(*i) * scale[i[-1]]
        return scaled if bias is None else scaled + bias[i[-1]]

    return te.compute((*lead, columns), value, name="coded_out")
