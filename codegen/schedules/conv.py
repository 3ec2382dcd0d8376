"""Convolutions: one written for each kind channels last, a schedule for grouped ones."""

from __future__ import annotations

from typing import Any

import tvm.s_tir

from codegen.kernels.conv import GEOMETRY, ConvShape
from codegen.kernels.tiles import build
from codegen.rule import Rule
from codegen.schedules._common import Blocks, parallel_chunks, vector_split
from codegen.schedules._conv2d import Conv2d
from codegen.schedules._depthwise import Depthwise
from codegen.schedules._elementwise import spread
from codegen.schedules._tail import Tail, plain, position
from codegen.target import Target


def apply(func: Any, target: Target) -> Any | None:
    """Takes functions with one of the blocks below and what was fused behind it."""
    blocks = Blocks(func)
    if "grouped_conv" in blocks.names:
        return _grouped(blocks, target)
    for name, kernel in (("conv", Conv2d), ("depthwise", Depthwise)):
        if name in blocks.names:
            return _written(func, blocks, name, kernel, target)
    return None


def _written(func: Any, blocks: Blocks, name: str, kernel: Any, target: Target) -> Any:
    """The kernel of `func` written anew: its block `name` and what was fused behind it."""
    sch, after = blocks.sch, blocks.after(name)
    for block in after[:-1]:
        sch.compute_inline(block)
    product = sch.get(blocks.named(name))
    shape = ConvShape.loads(str(product.annotations[GEOMETRY]))
    image, weight = (r.source for r in product.reads)
    if "conv_pad" in blocks.names:
        image = sch.get(blocks.named("conv_pad")).reads[0].source
    params, result = blocks.params, product.writes[0].source
    x, w = position(image, params), position(weight, params)

    def body(*args: Any) -> None:
        tail = Tail(sch.get(after[-1]), result, params, list(args)) if after else plain
        kernel(shape, target, args[x], args[w], args[-1]).write(tail)

    return tvm.s_tir.Schedule(build(func, body))


def _grouped(blocks: Blocks, target: Target) -> Any:
    sch, product = blocks.sch, blocks.named("grouped_conv")
    store = _tail(blocks, "grouped_conv")
    batch, out, row, column, c, dy, dx = sch.get_loops(product)
    sch.reorder(batch, out, row, c, dy, dx, column)
    vector_split(sch, column, target.lanes)
    _, inner = parallel_chunks(sch, [batch, out, row], target)
    if store is not None:
        sch.reverse_compute_at(store, inner)
        vector_split(sch, sch.get_loops(store)[-1], target.lanes)
    sch.decompose_reduction(product, c)
    _pad(blocks, target)
    return sch


def _tail(blocks: Blocks, name: str) -> Any:
    after = blocks.after(name)
    for block in after[:-1]:
        blocks.sch.compute_inline(block)
    return after[-1] if after else None


def _pad(blocks: Blocks, target: Target) -> None:
    for block, name in zip(blocks.list, blocks.names, strict=True):
        if name == "conv_pad":
            spread(blocks.sch, block, target)


RULE = Rule("conv", apply, kinds=("cpu", "edge"), order=25)
