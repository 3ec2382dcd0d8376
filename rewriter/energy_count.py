"""Operations of a whole model by EcoFormer's counting rule, layer by layer, read off its graph.

The rule is that of the counter released with Liu et al., "EcoFormer" (NeurIPS 2022), which counts
a multiply-accumulate as one multiplication and one addition:

    linear         rows * in * out                                       (a bias is free)
    convolution    outputs * (kernel * in / groups), and one more for each output with a bias
    norm           twice its elements (once without weights)
    softmax attention   2 products, and one multiplication for the scale of each weight
    other attention     as its form says (`Form.counted`)
    coded linear   as rewriter/energy_linears.py says

Everything else (softmax, activations, residual sums, pooling, embeddings) is free. One rule more
comes from its tables: in a network with spatially reduced attention the scale is not charged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from passes.forms.exact import Exact
from passes.opcount import OpCount
from passes.ops import arg, op_of, sizes, source, submodule_of
from passes.origin import module_path
from passes.substitute import AttentionModule
from rewriter.energy_linears import Coded, counted, packed_bytes, plain_bytes

LINEAR, CONV, NORM, PRODUCT, ATTENTION = (
    "linear", "conv", "norm", "product", "attention",
)  # fmt: skip
_NORMS = frozenset(
    {"layer_norm", "native_layer_norm", "batch_norm", "_native_batch_norm_legit_no_training",
     "group_norm", "native_group_norm", "rms_norm", "instance_norm"}
)  # fmt: skip
_PRODUCTS = frozenset({"matmul", "bmm", "mm", "baddbmm"})


@dataclass(frozen=True)
class Layer:
    """One layer that is charged. `name` is its module's path; `form` what stands at an attention
    or a coded linear layer, else ""; `weights` the bytes of a linear layer's weight and bias."""

    name: str
    kind: str
    ops: OpCount
    form: str = ""
    weights: int = 0


Linears = Mapping[str, Coded]  # by the names of their nodes


def count_layers(module: GraphModule, linears: Linears | None = None) -> list[Layer]:
    """The charged layers of a rewritten model's graph, in its order, for its example inputs.

    Raises:
        ValueError: an attention with a dynamic size (trace with static shapes to count).
    """
    return [layer for layer, _ in charged(module, linears)]


def charged(module: GraphModule, linears: Linears | None = None) -> Iterator[tuple[Layer, Node]]:
    """The charged layers with their nodes; `linears` are counted as the forms that stand there."""
    scaled = not any(m.site.reduced and isinstance(m.form, Exact) for _, m in _attentions(module))
    seen: Counter[tuple[str, str]] = Counter()
    for node in module.graph.nodes:
        layer = _layer(module, node, scaled)
        if layer is None:
            continue
        times = seen[layer.name, layer.kind]
        seen[layer.name, layer.kind] += 1
        if linears and node.name in linears:
            layer = _coded(layer, node, linears[node.name])
        if times:  # the weights of a layer that runs again are held once
            layer = replace(layer, name=f"{layer.name}#{times}", weights=0)
        yield layer, node


def _coded(layer: Layer, node: Node, coded: Coded) -> Layer:
    rows = math.prod(sizes(node)[:-1])
    held = packed_bytes(coded)
    return Layer(
        layer.name, layer.kind, counted(coded, rows), coded.form.name,
        layer.weights if held is None else held,
    )  # fmt: skip


def _attentions(module: GraphModule) -> Iterator[tuple[Node, AttentionModule]]:
    for node in module.graph.find_nodes(op="call_module"):
        called = submodule_of(node)
        if isinstance(called, AttentionModule):
            yield node, called


def _layer(module: GraphModule, node: Node, scaled: bool) -> Layer | None:
    called = submodule_of(node)
    if isinstance(called, AttentionModule):
        return Layer(called.site.id, ATTENTION, _attention(called, scaled), called.form.name)
    op = op_of(node)
    if op in ("linear", "addmm"):
        return _linear(node, op)
    if op == "conv":
        return _convolution(node)
    if op in _NORMS:
        return _norm(node)
    if op in _PRODUCTS:
        return _product(node, op)
    return None


def _attention(module: AttentionModule, scaled: bool) -> OpCount:
    count = module.form.counted(module.site)
    if isinstance(module.form, Exact) and not scaled:
        d = module.site.dims
        count = count + OpCount.of(mul=-int(d.B) * d.H * int(d.T) * int(d.S))
    return count


def _macs(node: Node, kind: str, macs: int, weight: str) -> Layer:
    return Layer(weight or module_path(node) or node.name, kind, OpCount.of(mul=macs, add=macs))


def _linear(node: Node, op: str) -> Layer:
    outputs, inputs = sizes(node)[-1], _inner(node, op)
    name = _weight(node, 2 if op == "addmm" else 1)
    layer = _macs(node, LINEAR, math.prod(sizes(node)) * inputs, name)
    bias = arg(node, 0 if op == "addmm" else 2, "bias") is not None
    return replace(layer, weights=plain_bytes(inputs, outputs, bias) if name else 0)


def _weight(node: Node, place: int) -> str:
    """The path of the module that holds the weight at argument `place`; "" if it is no weight."""
    if node.op == "call_module":
        return str(node.target)
    found = arg(node, place, "weight")
    while isinstance(found, Node) and found.op == "call_function":
        found = source(found)
    if not isinstance(found, Node) or found.op != "get_attr":
        return ""
    return str(found.target).rpartition(".")[0]


def _inner(node: Node, op: str) -> int:
    """The length of the sums of a linear layer."""
    read = node.args[1] if op == "addmm" else source(node)
    assert isinstance(read, Node)
    return sizes(read)[-1]


def _convolution(node: Node) -> Layer:
    called: Any = submodule_of(node)
    if called is not None:
        kernel, bias = called.weight.shape, called.bias
    else:
        weight = arg(node, 1, "weight")
        kernel, bias = sizes(weight), arg(node, 2, "bias")
    outputs = math.prod(sizes(node))
    macs = outputs * math.prod(kernel[1:]) + (outputs if bias is not None else 0)
    return _macs(node, CONV, macs, _weight(node, 1))


def _norm(node: Node) -> Layer | None:
    inner = source(node)
    if inner is None:
        return None
    places = {"layer_norm": 2, "native_layer_norm": 2, "rms_norm": 2, "group_norm": 2}
    called: Any = submodule_of(node)
    weight = arg(node, places.get(op_of(node), 1), "weight")
    weighted = weight is not None if called is None else called.weight is not None
    name = _weight(node, places.get(op_of(node), 1)) if weighted else ""
    return _macs(node, NORM, (2 if weighted else 1) * math.prod(sizes(inner)), name)


def _product(node: Node, op: str) -> Layer | None:
    """A product outside of any attention: of two activations, or with a bare parameter."""
    operands = node.args[1:3] if op == "baddbmm" else node.args[:2]
    a, b = operands
    if not isinstance(a, Node) or not isinstance(b, Node):
        return None
    weight = _weight(node, 1) if b.op == "get_attr" else ""
    kind = LINEAR if weight else PRODUCT
    return _macs(node, kind, math.prod(sizes(node)) * sizes(a)[-1], weight)
