"""Matrix products whose innermost step is one of the processor's dot-product instructions."""

from __future__ import annotations

import functools
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from codegen.kernels.dense import panel_width
from codegen.kernels.quantized import GROUP
from codegen.schedules._common import Blocks
from codegen.schedules.dense import (
    row_parallel,
    row_tile_of,
    store_block,
    store_vectors,
    weight_dominates,
)
from codegen.target import Target

IMPORT = "pragma_import_llvm"


def schedule_dot(blocks: Blocks, precision: str, target: Target) -> Any:
    """Tiles of rows x panel in registers, a group of the depth in one instruction a vector."""
    sch, name = blocks.sch, f"dense_{precision}"
    product = blocks.named(name)
    store = store_block(blocks, name)
    *lead, rows, columns, depth = sch.get_loops(product)
    over_panels = weight_dominates(sch, [*lead, rows], columns, depth)
    row_out, row_in = sch.split(rows, [None, row_tile_of(sch, store, target)])
    panel, column = sch.split(columns, [None, panel_width(target)])
    vector, lane = sch.split(column, [None, target.lanes])
    step, group = sch.split(depth, [None, GROUP[precision]])
    sch.reorder(*lead, row_out, panel, step, row_in, vector, lane, group)
    tile = row_parallel(sch, [*lead, row_out], panel, over_panels, target)
    sch.reverse_compute_at(store, tile)
    store_vectors(sch, store, target)
    sch.unroll(row_in)
    sch.unroll(vector)
    start = sch.decompose_reduction(product, step)
    sch.vectorize(sch.get_loops(start)[-1])
    sch.tensorize(lane, instruction(precision, target.lanes))
    if precision == "bf16":
        sch.annotate(tile, IMPORT, bf16_code(target))
    return sch


@functools.cache
def instruction(precision: str, lanes: int) -> str:
    """The name of the tensor intrinsic c[lanes] += a[group] . b[lanes, group]."""
    name = f"rewriter_dot_{precision}_{lanes}"
    step = _int8_step if precision == "int8" else _bf16_step
    TensorIntrin.register(name, _described(precision, lanes), _function(precision, lanes, step))
    return name


def _types(precision: str) -> tuple[str, str, str]:
    """dtypes of a, b and c."""
    return ("uint8", "int8", "int32") if precision == "int8" else ("uint16", "uint16", "float32")


def _arguments(precision: str, lanes: int) -> list[Any]:
    group = GROUP[precision]
    shapes = ((group,), (lanes, group), (lanes,))
    return [
        T.arg(name, T.buffer(shape, dtype, offset_factor=1))
        for name, shape, dtype in zip("abc", shapes, _types(precision), strict=True)
    ]


def _described(precision: str, lanes: int) -> Any:
    group = GROUP[precision]
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        a, b, c = _arguments(precision, lanes)
        with T.sblock("root"):
            T.reads([c[0:lanes], a[0:group], b[0:lanes, 0:group]])
            T.writes([c[0:lanes]])
            with T.grid(lanes, group) as (i, k), T.sblock("update"):
                vi, vk = T.axis.remap("SR", [i, k])
                value = c[vi] + _factor(precision, a[vk]) * _factor(precision, b[vi, vk])
                T.buffer_store(c, value, [vi])
    return ib.get()


def _factor(precision: str, value: Any) -> Any:
    if precision == "int8":
        return tirx.Cast("int32", value)
    wide = tirx.Cast("uint32", value) << tirx.const(16, "uint32")
    return tirx.reinterpret("float32", wide)


def _function(precision: str, lanes: int, step: Any) -> Any:
    group = GROUP[precision]
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("main")
        a, b, c = _arguments(precision, lanes)
        with T.sblock("root"):
            T.reads([c[0:lanes], a[0:group], b[0:lanes, 0:group]])
            T.writes([c[0:lanes]])
            pair = tirx.reinterpret("int32", a.vload([0], f"{a.dtype}x{group}"))
            row = tirx.Broadcast(pair, lanes)
            columns = b.vload([0, 0], f"{b.dtype}x{lanes * group}")
            total = c.vload([0], f"{c.dtype}x{lanes}")
            T.buffer_store(c, step(total, row, columns, lanes), [tirx.Ramp(0, 1, lanes)])
    return ib.get()


def _int8_step(total: Any, row: Any, columns: Any, lanes: int) -> Any:
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    lookup = tvm_ffi.get_global_func("target.llvm_lookup_intrinsic_id")
    return tirx.call_llvm_pure_intrin(
        f"int32x{lanes}",
        tirx.const(lookup(name), "uint32"),
        total,
        tirx.reinterpret(f"uint8x{4 * lanes}", row),
        columns,
    )


def _bf16_step(total: Any, row: Any, columns: Any, lanes: int) -> Any:
    return tirx.call_pure_extern(
        f"float32x{lanes}",
        BF16_DOT,
        total,
        row,
        tirx.reinterpret(f"int32x{lanes}", columns),
    )


BF16_DOT = "rewriter_dpbf16"


def bf16_code(target: Target) -> str:
    """LLVM code of the function around vdpbf16ps: TVM's own bfloat16 types would be widened."""
    lanes, mattr = target.lanes, ",".join(target.tvm.get("mattr", ()))
    called = f"@llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
    f, i, b = f"<{lanes} x float>", f"<{lanes} x i32>", f"<{2 * lanes} x bfloat>"
    return f"""
declare {f} {called}({f}, {b}, {b})
define {f} @{BF16_DOT}({f} %c, {i} %a, {i} %b) #0 {{
  %x = bitcast {i} %a to {b}
  %y = bitcast {i} %b to {b}
  %r = call {f} {called}({f} %c, {b} %x, {b} %y)
  ret {f} %r
}}
attributes #0 = {{ alwaysinline nounwind "target-cpu"="{target.tvm["mcpu"]}" \
"target-features"="{mattr}" }}
"""
