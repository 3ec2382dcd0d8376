"""The linear layers of a canonical graph: which nodes they are, and who else reads their weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

_ATEN = torch.ops.aten
_LINEAR = _ATEN.linear.default
_ADDMM = _ATEN.addmm.default
_MATMUL = (_ATEN.matmul.default, _ATEN.mm.default)
_TURNS = {_ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default}


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer: y = x weight^T + bias, or x weight + bias if `transposed`.

    `id` is the path of its module and survives a re-trace; `shared` names who else reads the
    weight ("" if nobody does).
    """

    id: str
    node: str
    weight: str
    bias: str | None
    inputs: int
    outputs: int
    dtype: str
    transposed: bool = False
    shared: str = ""


def find_linears(module: GraphModule) -> tuple[LinearLayer, ...]:
    """The linear layers of `module` whose weight is a parameter, in the order of the graph."""
    found = []
    uses = _uses(module)
    taken: Counter[str] = Counter()
    for node, weight, bias, transposed in _linear_nodes(module):
        tensor = tensor_named(module, weight)
        base = weight.rpartition(".")[0] or weight
        taken[base] += 1
        name = base if taken[base] == 1 else f"{base}#{taken[base] - 1}"
        outputs, inputs = (int(n) for n in (tensor.T if transposed else tensor).shape)
        others = [u for u in uses[id(tensor)] if u != node.name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append(
            LinearLayer(
                name, node.name, weight, bias, inputs, outputs, dtype, transposed,
                " and ".join(others),
            )
        )  # fmt: skip
    return tuple(found)


def _linear_nodes(module: GraphModule) -> Iterator[tuple[Node, str, str | None, bool]]:
    for node in module.graph.nodes:
        made = linear_parts(node)
        if made is None:
            continue
        weight, bias, transposed = made
        if not is_parameter(weight) or not (bias is None or is_parameter(bias)):
            continue
        tensor = tensor_named(module, str(weight.target))  # type: ignore[attr-defined]
        if tensor.dim() == 2:
            told = None if bias is None else str(bias.target)  # type: ignore[attr-defined]
            yield node, str(weight.target), told, transposed  # type: ignore[attr-defined]


def linear_parts(node: Node) -> tuple[object, object, bool] | None:
    """(weight, bias, transposed) of a node that may be a linear layer."""
    if node.target is _LINEAR:
        return node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias"), False
    if node.target is _ADDMM and not node.kwargs:
        bias, _, weight = node.args[:3]
        turned = isinstance(weight, Node) and weight.target in _TURNS
        return (weight.args[0] if turned else weight), bias, not turned  # type: ignore[union-attr]
    if node.target in _MATMUL:
        return node.args[1], None, True
    return None


def is_parameter(value: object) -> bool:
    """Whether `value` is a node that reads a tensor of the module."""
    return isinstance(value, Node) and value.op == "get_attr"


def input_of(node: Node) -> Node:
    """What a linear layer's node multiplies with its weight."""
    x = node.args[1] if node.target is _ADDMM else node.args[0]
    assert isinstance(x, Node)
    return x


def tensor_named(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer with this dotted name."""
    path, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(path), leaf)
    assert isinstance(value, Tensor)
    return value


def _uses(module: GraphModule) -> dict[int, list[str]]:
    """Names of the nodes that read each tensor, by the tensor's identity; turns are looked through.

    A tied weight may stand in the graph under two names; it is one tensor.
    """
    found: dict[int, list[str]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = _attribute(module, str(node.target))
            if isinstance(value, Tensor):
                found.setdefault(id(value), []).extend(_readers(node))
    return found


def _attribute(module: nn.Module, name: str) -> object:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf, None)


def _readers(node: Node) -> Iterator[str]:
    for user in node.users:
        if user.target in _TURNS:
            yield from (u.name for u in user.users)
        else:
            yield user.name
