"""The innermost step of products with codes: one word of codes for each lane of a vector.

The LLVM functions here hold what the codes stand for in registers and look it up by vpermps,
which reads only the lowest 4 bits of an index (vpermt2ps: 5); one multiply-add follows. It also
stands for ``add``, whose products are made by adding to an exponent: a product with a power of two
is exact, so the sums are the same, but for products below the smallest normal number, which it
keeps (two powers: and for the rounding of their sum). Binary codes look up a table of signed sums:
of the parts of an input, or of the alphas.
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
from codegen.kernels.coded import LANES, code_of, product_of, weight_of
from codegen.target import Target
from passes.linear_forms._codes import PANEL, CodeSpec

AHEAD = 2048  # bytes of a panel's words: 16 steps
FETCHING = 2  # rows up to which memory is slower than the multiply-adds
_F, _I = "<16 x float>", "<16 x i32>"
_ONE_TABLE = "@llvm.x86.avx512.permvar.sf.512"
_TWO_TABLES = "@llvm.x86.avx512.vpermi2var.ps.512"


def values_name(spec: CodeSpec) -> str:
    """Name of the LLVM function that gives the values of codes."""
    return f"rewriter_code_values_{spec.key}"


def values_code(spec: CodeSpec, target: Target) -> str:
    """The LLVM function <16 x i32> -> <16 x float>: the values of the lowest codes of 16 words."""
    body = _Body(spec)
    made = body.look_up(body.weights(), "%w")
    return _module(f"define {_F} @{values_name(spec)}({_I} %w)", body, made, target)


def step_name(kind: str, spec: CodeSpec) -> str:
    """Name of the LLVM function of one step."""
    return f"rewriter_coded_{kind}_{spec.key}"


def _fetch_name(kind: str, spec: CodeSpec) -> str:
    return f"{step_name(kind, spec)}_fetch"


def step_code(kind: str, spec: CodeSpec, target: Target) -> str:
    """The LLVM function c + (x times the values of the lowest codes of 16 words), and `_fetch`'s.

    Arguments are c, x, the parts whose signed sums binary codes stand for, and the words; of
    "binary_add" the parts are those of an input, and there is no x.
    """
    body, binary = _Body(spec), kind.startswith("binary")
    parts = [f"%p{r}" for r in range(spec.bits)] if binary else []
    value = body.look_up([body.sums(parts)] if binary else body.weights(), "%w")
    if kind == "binary_add":
        total = body.line(f"fadd {_F} %c, {value}")
    else:
        row = body.spread("%x")
        total = body.line(f"call {_F} @llvm.fma.v16f32({_F} {row}, {_F} {value}, {_F} %c)")
    floats = "".join(f", float {p}" for p in ([] if kind == "binary_add" else ["%x"]) + parts)
    head = f"define {_F} @{step_name(kind, spec)}({_F} %c{floats}, {_I} %w)"
    return f"""{_module(head, body, total, target)}
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define void @{_fetch_name(kind, spec)}(ptr %w) #0 {{
  %later = getelementptr i8, ptr %w, i64 {AHEAD}
  call void @llvm.prefetch.p0(ptr %later, i32 0, i32 3, i32 1)
  ret void
}}
"""


def _module(head: str, body: _Body, result: str, target: Target) -> str:
    mattr = ",".join(target.tvm.get("mattr", ()))
    return f"""
declare {_F} @llvm.fma.v16f32({_F}, {_F}, {_F})
declare {_F} {_ONE_TABLE}({_F}, {_I})
declare {_F} {_TWO_TABLES}({_F}, {_I}, {_F})
{head} #0 {{
{body.text()}
  ret {_F} {result}
}}
attributes #0 = {{ alwaysinline nounwind "target-cpu"="{target.tvm["mcpu"]}" \
"target-features"="{mattr}" }}
"""


@functools.cache
def instruction(kind: str, spec: CodeSpec, rows: int, panels: int, index: str) -> str:
    """The tensor intrinsic c[rows, panels * 32] += sum over i of x[rows, i] times code i of w.

    `index` is the type of the kernel's loop variables, which must be the same.
    """
    name = f"rewriter_coded_step_{kind}_{spec.key}_{rows}_{panels}_{index}"
    size = (rows, panels)
    TensorIntrin.register(
        name, _described(kind, spec, size, index), _called(kind, spec, size, index)
    )
    return name


def _arguments(kind: str, spec: CodeSpec, size: tuple[int, int], index: str) -> list[Any]:
    """c, x, the alphas of binary codes, if not in x, and w.

    Parts of larger tensors, so all strides but the last are left open.
    """
    rows, panels = size
    lead = (rows,) if rows > 1 else ()  # a schedule has no axis for one row
    parts = (spec.per, spec.bits)
    inputs = parts if kind == "binary_add" else parts[:1]
    shapes = {
        "c": ((*lead, panels * PANEL), "float32"),
        "x": ((*lead, *inputs), "float32"),
        **({"a": (parts, "float32")} if kind == "binary_fma" else {}),
        "w": ((panels, 1, PANEL), "int32"),
    }
    return [
        T.arg(name, T.buffer(shape, dtype, strides=_strides(name, shape, index), offset_factor=1))
        for name, (shape, dtype) in shapes.items()
    ]


def _strides(name: str, shape: tuple[int, ...], index: str) -> list[Any]:
    return [
        *(tirx.Var(f"{name}_{n}", index) for n in range(len(shape) - 1)),
        tirx.const(1, index),
    ]


def _regions(buffers: list[Any]) -> list[Any]:
    return [b[tuple(slice(0, int(n)) for n in b.shape)] for b in buffers]


def _described(kind: str, spec: CodeSpec, size: tuple[int, int], index: str) -> Any:
    rows, panels = size
    extents = (*([rows] if rows > 1 else []), panels * PANEL, spec.per)
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        c, x, *alpha, w = buffers = _arguments(kind, spec, size, index)
        with T.sblock("root"):
            regions = _regions(buffers)
            T.reads(regions)
            T.writes(regions[:1])
            grid = T.grid(*(tirx.const(n, index) for n in extents))
            with grid as loops, T.sblock("update"):
                *vr, vn, vi = T.axis.remap("SSR"[-len(extents) :], list(loops))
                code = code_of(spec, w[vn // PANEL, 0, vn % PANEL], vi)
                made = _made(kind, spec, lambda *k: x[(*vr, *k)], *alpha, i=vi, code=code)
                T.buffer_store(c, c[(*vr, vn)] + made, [*vr, vn])
    return ib.get()


def _made(kind: str, spec: CodeSpec, x: Any, alpha: Any = None, *, i: Any, code: Any) -> Any:
    """What one code adds to the sum."""
    if kind == "binary_add":
        return signed_sum(spec, lambda r: x(i, r), code)
    if kind == "binary_fma":
        return x(i) * signed_sum(spec, lambda r: alpha[i, r], code)
    return product_of(spec, x(i), code) if kind == "add" else x(i) * weight_of(spec, code)


def _called(kind: str, spec: CodeSpec, size: tuple[int, int], index: str) -> Any:
    rows, vectors = size[0], size[1] * PANEL // LANES
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        buffers = _arguments(kind, spec, size, index)
        with T.sblock("root"):
            regions = _regions(buffers)
            T.reads(regions)
            T.writes(regions[:1])
            if rows <= FETCHING:
                _fetch(kind, spec, buffers[-1])
            # Sums next to each other do not wait for each other.
            for i in range(spec.per):
                for v in range(vectors):
                    for r in range(rows):
                        _step(kind, spec, buffers, (r, v, i))
    return ib.get()


def _fetch(kind: str, spec: CodeSpec, w: Any) -> None:
    """Ask for the words of a later step, a line of the cache at a time."""
    for panel in range(int(w.shape[0])):
        for first in range(0, PANEL, LANES):
            place = tirx.address_of(w[panel, 0, first])
            T.evaluate(tirx.call_extern("void", _fetch_name(kind, spec), place))


def _step(kind: str, spec: CodeSpec, buffers: Any, at: tuple[int, int, int]) -> None:
    """c of row r and vector v += code i of its words times its input."""
    (c, x, *alpha, w), (row, v, i) = buffers, at
    r = [row] if len(c.shape) > 1 else []
    panel, first = divmod(v * LANES, PANEL)
    word = w.vload([panel, 0, first], f"int32x{LANES}")
    shift = tirx.Broadcast(tirx.const(i * spec.bits, "int32"), LANES)
    if kind == "binary_add":
        given = [x[(*r, i, part)] for part in range(spec.bits)]
    else:
        given = [x[(*r, i)], *(a[i, part] for a in alpha for part in range(spec.bits))]
    done = tirx.call_pure_extern(
        f"float32x{LANES}",
        step_name(kind, spec),
        c.vload([*r, v * LANES], f"float32x{LANES}"),
        *given,
        word >> shift if i else word,
    )
    T.buffer_store(c, done, [*r, tirx.Ramp(v * LANES, 1, LANES)])


class _Body:
    """Lines of an LLVM function; every method returns the name (or constant) of its result."""

    def __init__(self, spec: CodeSpec) -> None:
        self.spec = spec
        self.lines: list[str] = []

    def line(self, code: str) -> str:
        name = f"%v{len(self.lines)}"
        self.lines.append(f"  {name} = {code}")
        return name

    def text(self) -> str:
        return "\n".join(self.lines)

    def spread(self, value: str) -> str:
        """A float in all lanes."""
        one = self.line(f"insertelement {_F} poison, float {value}, i32 0")
        return self.line(f"shufflevector {_F} {one}, {_F} poison, {_I} zeroinitializer")

    def weights(self) -> list[str]:
        """Constant tables of the codes' values."""
        values = self.spec.values()
        whole = values * (LANES // len(values)) if len(values) < LANES else values
        parts = [whole[at : at + LANES] for at in range(0, len(whole), LANES)]
        return [_vector("float", [_float(v) for v in part]) for part in parts]

    def look_up(self, tables: list[str], index: str) -> str:
        if len(tables) == 1:
            return self.line(f"call {_F} {_ONE_TABLE}({_F} {tables[0]}, {_I} {index})")
        low, high = tables
        return self.line(f"call {_F} {_TWO_TABLES}({_F} {low}, {_I} {index}, {_F} {high})")

    def sums(self, parts: list[str]) -> str:
        """The table of signed sums of some floats."""
        total = ""
        for r, part in enumerate(parts):
            bits = self.line(f"bitcast {_F} {self.spread(part)} to {_I}")
            sign = _vector("i32", [str(0 if c >> r & 1 else -(2**31)) for c in range(LANES)])
            turned = self.line(f"xor {_I} {bits}, {sign}")
            signed = self.line(f"bitcast {_I} {turned} to {_F}")
            total = self.line(f"fadd {_F} {total}, {signed}") if total else signed
        return total


def _vector(kind: str, values: list[str]) -> str:
    return "<" + ", ".join(f"{kind} {v}" for v in values) + ">"


def _float(value: float) -> str:
    return "0x" + struct.pack(">d", value).hex().upper()
