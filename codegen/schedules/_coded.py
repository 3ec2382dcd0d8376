"""The innermost step of products with codes: one word of codes for each lane of a vector.

The LLVM functions here hold what the codes stand for in registers and look it up by vpermps,
which reads only the lowest 4 bits of an index (vpermt2ps: 5). In ``add`` the table is of products,
made by adding to the exponent of the input; it is shared by all vectors that read the same input.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels.binary import signed_sum
from codegen.kernels.coded import NAN, Term, code_of, product_of, terms_of, weight_of
from codegen.target import Target
from passes.linear_forms._codes import CodeSpec

LANES = 16
_F, _I = "<16 x float>", "<16 x i32>"
_ONE_TABLE = "@llvm.x86.avx512.permvar.sf.512"
_TWO_TABLES = "@llvm.x86.avx512.vpermi2var.ps.512"


def function_name(kind: str, spec: CodeSpec) -> str:
    """Name of the LLVM function of one step."""
    return f"rewriter_coded_{kind}_{spec.key}"


def has_tables(target: Target) -> bool:
    """Whether the target looks codes up in registers."""
    return target.lanes == LANES and "avx512f" in target.features


def values_name(spec: CodeSpec) -> str:
    """Name of the LLVM function that gives the values of codes."""
    return f"rewriter_code_values_{spec.key}"


def values_code(spec: CodeSpec, target: Target) -> str:
    """The LLVM function <16 x i32> -> <16 x float>: the values of the lowest codes of 16 words."""
    body = _Body(spec, 0)
    made = body.look_up(body.weights(), "%w")
    return f"""
declare {_F} {_ONE_TABLE}({_F}, {_I})
declare {_F} {_TWO_TABLES}({_F}, {_I}, {_F})
define {_F} @{values_name(spec)}({_I} %w) #0 {{
{body.text()}
  ret {_F} {made}
}}
{_attributes(target)}
"""


def _attributes(target: Target) -> str:
    mattr = ",".join(target.tvm.get("mattr", ()))
    return (
        f'attributes #0 = {{ alwaysinline nounwind "target-cpu"="{target.tvm["mcpu"]}" '
        f'"target-features"="{mattr}" }}'
    )


@functools.cache
def instruction(kind: str, spec: CodeSpec, index: str) -> str:
    """The tensor intrinsic c[16] += sum over i of x[i] times code i of w[16].

    `index` is the type of the kernel's loop variables, which must be the same.
    """
    name = f"rewriter_coded_step_{kind}_{spec.key}_{index}"
    TensorIntrin.register(name, _described(kind, spec, index), _called(kind, spec))
    return name


def _arguments(kind: str, spec: CodeSpec) -> list[Any]:
    inputs = (spec.per, spec.bits) if kind == "binary" else (spec.per,)
    shapes = {"c": ((LANES,), "float32"), "x": (inputs, "float32"), "w": ((LANES,), "int32")}
    return [
        T.arg(name, T.buffer(shape, dtype, offset_factor=1))
        for name, (shape, dtype) in shapes.items()
    ]


def _described(kind: str, spec: CodeSpec, index: str) -> Any:
    lanes, per = (tirx.const(n, index) for n in (LANES, spec.per))
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        c, x, w = _arguments(kind, spec)
        with T.sblock("root"):
            T.reads([c[0:LANES], _region(kind, spec, x), w[0:LANES]])
            T.writes([c[0:LANES]])
            with T.grid(lanes, per) as (lane, i), T.sblock("update"):
                vl, vi = T.axis.remap("SR", [lane, i])
                code = code_of(spec, w[vl], vi)
                made = _made(kind, spec, x, vi, code)
                T.buffer_store(c, c[vl] + made, [vl])
    return ib.get()


def _region(kind: str, spec: CodeSpec, x: Any) -> Any:
    return x[0 : spec.per, 0 : spec.bits] if kind == "binary" else x[0 : spec.per]


def _made(kind: str, spec: CodeSpec, x: Any, i: Any, code: Any) -> Any:
    """What one code adds to the sum."""
    if kind == "binary":
        return signed_sum(spec, lambda r: x[i, r], code)
    return product_of(spec, x[i], code) if kind == "add" else x[i] * weight_of(spec, code)


def _width(kind: str, spec: CodeSpec) -> int:
    """Floats that one step reads of the inputs."""
    return spec.per * (spec.bits if kind == "binary" else 1)


def _called(kind: str, spec: CodeSpec) -> Any:
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        c, x, w = _arguments(kind, spec)
        with T.sblock("root"):
            T.reads([c[0:LANES], _region(kind, spec, x), w[0:LANES]])
            T.writes([c[0:LANES]])
            done = tirx.call_pure_extern(
                f"float32x{LANES}",
                function_name(kind, spec),
                c.vload([0], f"float32x{LANES}"),
                x.vload([0] * len(x.shape), f"float32x{_width(kind, spec)}"),
                w.vload([0], f"int32x{LANES}"),
            )
            T.buffer_store(c, done, [tirx.Ramp(0, 1, LANES)])
    return ib.get()


def llvm_code(kind: str, spec: CodeSpec, target: Target) -> str:
    """The LLVM function of one step."""
    body = _Body(spec, _width(kind, spec))
    total = "%c"
    shared = body.weights() if kind == "fma" else []
    for i in range(spec.per):
        index = "%w" if i == 0 else body.line(f"lshr {_I} %w, {_all(i * spec.bits)}")
        row = "" if kind == "binary" else body.input(i)
        tables = shared or (body.products(row) if row else [body.sums(i)])
        value = body.look_up(tables, index)
        if kind == "fma":
            total = body.line(f"call {_F} @llvm.fma.v16f32({_F} {row}, {_F} {value}, {_F} {total})")
        else:
            total = body.line(f"fadd {_F} {total}, {value}")
    return f"""
declare {_F} @llvm.fma.v16f32({_F}, {_F}, {_F})
declare {_F} {_ONE_TABLE}({_F}, {_I})
declare {_F} {_TWO_TABLES}({_F}, {_I}, {_F})
define {_F} @{function_name(kind, spec)}({_F} %c, <{body.width} x float> %x, {_I} %w) #0 {{
{body.text()}
  ret {_F} {total}
}}
{_attributes(target)}
"""


class _Body:
    """Lines of an LLVM function; every method returns the name (or constant) of its result."""

    def __init__(self, spec: CodeSpec, width: int) -> None:
        self.spec, self.width = spec, width
        self.lines: list[str] = []

    def line(self, code: str) -> str:
        name = f"%v{len(self.lines)}"
        self.lines.append(f"  {name} = {code}")
        return name

    def text(self) -> str:
        return "\n".join(self.lines)

    def input(self, at: int) -> str:
        """Input `at` in all lanes."""
        value = self.line(f"extractelement <{self.width} x float> %x, i32 {at}")
        one = self.line(f"insertelement {_F} poison, float {value}, i32 0")
        return self.line(f"shufflevector {_F} {one}, {_F} poison, {_I} zeroinitializer")

    def weights(self) -> list[str]:
        """Constant tables of the codes' values."""
        return [_vector("float", [_float(v) for v in part]) for part in self._tables()]

    def _tables(self) -> list[list[float]]:
        values = self.spec.values()
        whole = values * (LANES // len(values)) if len(values) < LANES else values
        return [whole[at : at + LANES] for at in range(0, len(whole), LANES)]

    def look_up(self, tables: list[str], index: str) -> str:
        if len(tables) == 1:
            return self.line(f"call {_F} {_ONE_TABLE}({_F} {tables[0]}, {_I} {index})")
        low, high = tables
        return self.line(f"call {_F} {_TWO_TABLES}({_F} {low}, {_I} {index}, {_F} {high})")

    def sums(self, i: int) -> str:
        """The table of signed sums of the parts of input `i`."""
        total, bits = "", self.spec.bits
        for r in range(bits):
            part = self.line(f"bitcast {_F} {self.input(i * bits + r)} to {_I}")
            sign = [0 if c >> r & 1 else -(2**31) for c in range(LANES)]
            turned = self.line(f"xor {_I} {part}, {_ints(sign)}")
            one = self.line(f"bitcast {_I} {turned} to {_F}")
            total = self.line(f"fadd {_F} {total}, {one}") if total else one
        return total

    def products(self, row: str) -> list[str]:
        """Tables of x times the codes' values, for one input x in all lanes of `row`."""
        bits = self.line(f"bitcast {_F} {row} to {_I}")
        high = self.line(f"lshr {_I} {bits}, {_all(23)}")
        exponent = self.line(f"and {_I} {high}, {_all(255)}")
        large = self.line(f"icmp eq {_I} {exponent}, {_all(255)}")
        known = (bits, exponent, large)
        codes = 1 << self.spec.bits
        count = max(codes, LANES)
        lanes = [c % codes for c in range(count)]
        return [self._table(lanes[at : at + LANES], *known) for at in range(0, count, LANES)]

    def _table(self, codes: list[int], *known: str) -> str:
        parts = [self._term(term, codes, *known) for term in terms_of(self.spec)]
        total = parts[0]
        for part in parts[1:]:
            total = self.line(f"fadd {_F} {total}, {part}")
        sign = [-(2**31) * (c >> (self.spec.bits - 1) & 1) for c in codes]
        bits = self.line(f"bitcast {_F} {total} to {_I}")
        turned = self.line(f"xor {_I} {bits}, {_ints(sign)}")
        return self.line(f"bitcast {_I} {turned} to {_F}")

    def _term(self, term: Term, codes: list[int], bits: str, exponent: str, large: str) -> str:
        fields = [(c >> term.at) & term.mask for c in codes]
        down = [term.top - (f << term.up) for f in fields]
        some = _vector("i1", [str(int(f != 0)) for f in fields])
        fits = self.line(f"icmp sgt {_I} {exponent}, {_ints(down)}")
        used = self.line(f"and <16 x i1> {fits}, {some}")
        moved = self.line(f"sub {_I} {bits}, {_ints([d << 23 for d in down])}")
        finite = self.line(f"select <16 x i1> {used}, {_I} {moved}, {_I} zeroinitializer")
        special = self.line(f"select <16 x i1> {some}, {_I} {bits}, {_I} {_all(NAN)}")
        safe = self.line(f"select <16 x i1> {large}, {_I} {special}, {_I} {finite}")
        return self.line(f"bitcast {_I} {safe} to {_F}")


def _vector(kind: str, values: list[str]) -> str:
    return "<" + ", ".join(f"{kind} {v}" for v in values) + ">"


def _ints(values: list[int]) -> str:
    return _vector("i32", [str(v) for v in values])


def _all(value: int) -> str:
    return _ints([value] * LANES)


def _float(value: float) -> str:
    return "0x" + struct.pack(">d", value).hex().upper()
