"""Layers of a graph as loop nests for the accelerator model of codegen/eyeriss.py.

A linear layer or product is a nest of its rows, outputs and inputs, a convolution one of its
images, a depthwise one with its channels as images. A kernel that is not square counts as the
square of its area, as in the hardware model of ShiftAddViT; norms cost nothing in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from codegen.energy import HOROWITZ_45NM, energy
from codegen.eyeriss import ROW, Estimate, Kind, Nest, estimate
from passes.forms.exact import Exact
from passes.forms.hamming import Hamming
from passes.forms.shiftadd import TAPS, ShiftAdd
from passes.opcount import OpCount
from passes.ops import arg, op_of, sizes, source, submodule_of
from passes.site import AttentionSite
from passes.substitute import AttentionModule
from rewriter.energy_count import CONV, LINEAR, PRODUCT, Layer, Linears, charged
from rewriter.energy_linears import nests

PICOJOULES = 1e9


@dataclass(frozen=True)
class Modelled:
    """A layer with what the accelerator model says of it; `told` where that says less than it
    seems to, because the form has no nest of its own."""

    layer: Layer
    cost: Estimate
    ops: OpCount
    told: str = ""


def model_layers(
    module: GraphModule, linears: Linears | None = None, *, released: bool = False
) -> list[Modelled]:
    """Every layer of a rewritten graph by the accelerator model; `linears` as `charged` has them.

    With `released` three defects of the script that came with the paper are kept: products of a
    softmax attention are not seen, nor is hashing, and every addition of chosen values is charged
    what the first one of the model costs.

    Raises:
        ValueError: a dynamic size, or a layer that fits the array in no way.
    """
    found, first = [], None
    for layer, node in charged(module, linears):
        made = _made(node, layer, linears or {}, released)
        if made is None:
            found.append(_without_nest(node, layer))
            continue
        costs = [estimate(nest) for nest in made]
        if released:
            for i, nest in enumerate(made):
                if nest.kind is Kind.ADD:
                    first = first or costs[i]
                    costs[i] = first
        total = sum(costs, Estimate(0.0, 0.0, 0.0))
        found.append(Modelled(layer, total, _operations(made)))
    return found


def _operations(nests: Sequence[Nest]) -> OpCount:
    """What the model charges: a product's or shift's sum is free."""
    named = {Kind.MULTIPLY: ("mul", "float32"), Kind.ADD: ("add", "float32"),
             Kind.SHIFT: ("shift", "int32")}  # fmt: skip
    return sum(
        (OpCount({named[n.kind]: n.operations}) for n in nests),
        OpCount(),
    )


def _made(node: Node, layer: Layer, linears: Linears, released: bool) -> tuple[Nest, ...] | None:
    """The nests of a layer; None for a form that is not modelled."""
    called = submodule_of(node)
    if isinstance(called, AttentionModule):
        return _attention(called, released)
    if node.name in linears:
        return nests(linears[node.name], math.prod(sizes(node)[:-1]))
    return _nests(node, layer.kind)


def _without_nest(node: Node, layer: Layer) -> Modelled:
    """An attention: its own operations by the table and no data moved. A coded linear layer: data
    as a shift layer moves them, its counted operations, and its additions one after the other."""
    called = submodule_of(node)
    if isinstance(called, AttentionModule):
        arithmetic = _priced(called.form.ops(called.site))
        told = f"no data movement is modelled for the form {layer.form}"
        return Modelled(layer, Estimate(arithmetic, arithmetic, 0.0), OpCount(), told)
    shift = estimate(replace(_product(node), kind=Kind.SHIFT))
    arithmetic, products = _priced(layer.ops), _product(node).operations
    cost = Estimate(
        shift.energy_mj - shift.arithmetic_mj + arithmetic,
        arithmetic,
        shift.latency_ms * max(1.0, layer.ops.total("add") / products),
    )
    told = f"the form {layer.form} is taken to move data as a shift layer does"
    return Modelled(layer, cost, layer.ops, told)


def _priced(ops: OpCount) -> float:
    return sum(energy(ops, HOROWITZ_45NM).arithmetic.values()) / PICOJOULES


def _product(node: Node) -> Nest:
    place = 1 if op_of(node) in ("addmm", "baddbmm") else 0
    read = node.args[place]
    assert isinstance(read, Node)
    out = sizes(node)
    return Nest(math.prod(out[:-1]), out[-1], sizes(read)[-1])


def _nests(node: Node, kind: str) -> tuple[Nest, ...]:
    if kind == CONV:
        return (_convolution(node),)
    return (_product(node),) if kind in (LINEAR, PRODUCT) else ()


def _convolution(node: Node) -> Nest:
    called: Any = submodule_of(node)
    inner = source(node)
    assert inner is not None
    if called is not None:
        kernel, groups, steps = tuple(called.weight.shape), called.groups, called.stride
    else:
        weight = arg(node, 1, "weight")
        kernel, groups = sizes(weight), int(arg(node, 6, "groups", 1))
        steps = arg(node, 3, "stride", 1)
    stride = int(steps[0]) if isinstance(steps, list | tuple) else int(steps)
    image, out = sizes(inner), sizes(node)
    side = max(1, round(math.prod(kernel[2:]) ** (1 / 2)))
    high, wide = (*image[2:], 1)[:2]
    if side >= ROW or out[2] == 1:  # the array has no rows for it: a product of unfolded patches
        rows = image[0] * groups * math.prod(out[2:])
        return Nest(rows, kernel[0] // groups, math.prod(kernel[1:]))
    return Nest(
        N=image[0] * groups, M=kernel[0] // groups, C=kernel[1], E=out[2], F=(*out[3:], 1)[0],
        R=side, S=side, H=high, W=wide, stride=stride,
    )  # fmt: skip


def _attention(module: AttentionModule, released: bool) -> tuple[Nest, ...] | None:
    """The nests of an attention; None for a form that is not modelled."""
    form, d = module.form, module.site.dims
    queries, keys = int(d.B) * d.H * int(d.T), int(d.B) * d.G * int(d.S)
    if isinstance(form, Exact):
        if released:
            return ()
        return (Nest(queries, int(d.S), d.D), Nest(queries, d.E, int(d.S)))
    if isinstance(form, Hamming):
        bits, hashed = form.options.bits, True
    elif isinstance(form, ShiftAdd):
        hashed = form.options.quantiser == "hash"
        bits = form.options.bits if hashed else d.D
    else:
        return None
    groups = int(d.B) * d.G
    made = [
        Nest(groups * bits, d.E, int(d.S), kind=Kind.ADD),
        Nest(queries, d.E, bits, kind=Kind.ADD),
    ]
    if isinstance(form, ShiftAdd):
        made.append(_taps(module.site))
    if hashed and not released:
        made += hashing(queries if module.site.shared else queries + keys, form, d.D)
    return tuple(made)


def hashing(rows: int, form: Hamming | ShiftAdd, width: int) -> list[Nest]:
    """Distances to the anchors and the mixing of `rows` rows."""
    anchors, bits = form.options.anchors, form.options.bits
    return [Nest(rows, anchors, width), Nest(rows, bits, anchors)]


def _taps(site: AttentionSite) -> Nest:
    """The depthwise convolution over tokens: nine by one, taken as three by three."""
    d, side = site.dims, math.isqrt(TAPS)
    return Nest(N=int(d.B) * d.H, M=1, C=1, E=int(d.T), F=d.E, R=side, S=side, H=int(d.T), W=d.E)
