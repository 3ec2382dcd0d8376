"""The linear layers around an attention site, found in the graph; shared ones are left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from passes.linear_layers import is_parameter, linear_parts
from passes.site import AttentionSite
from passes.substitute import Rewritten

_ATEN = torch.ops.aten
_SAME = {
    _ATEN.clone.default, _ATEN.contiguous.default, _ATEN.dropout.default, _ATEN.alias.default,
    _ATEN.detach.default, _ATEN._to_copy.default, _ATEN.to.dtype, _ATEN.dropout_.default,
    _ATEN.native_dropout.default,
}  # fmt: skip
_VIEWS = {
    _ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default, _ATEN.flatten.using_ints,
    _ATEN.unflatten.int,
}  # fmt: skip
_MOVES = {_ATEN.transpose.int, _ATEN.permute.default}
# Passed on the way back from q, k or v to their linear: also what splits a fused projection.
_BACK = {
    *_SAME, *_VIEWS, *_MOVES, _ATEN.mul.Tensor, _ATEN.mul.Scalar, _ATEN.div.Tensor,
    _ATEN.unsqueeze.default, _ATEN.squeeze.dim, _ATEN.select.int, _ATEN.slice.Tensor,
    _ATEN.split.Tensor, _ATEN.chunk.default, _ATEN.unbind.int, _ATEN.split_with_sizes.default,
}  # fmt: skip
_GETITEM = "getitem"


@dataclass(frozen=True)
class Linear:
    """A linear layer of a graph: y = x weight^T + bias, or x weight + bias if `transposed`."""

    node: Node
    weight: str
    bias: str | None
    transposed: bool = False

    @property
    def names(self) -> list[str]:
        """Names of its parameters."""
        return [n for n in (self.weight, self.bias) if n is not None]


def as_linear(node: Node) -> Linear | None:
    """`node` as a linear layer with parameters of the module, or None."""
    parts = linear_parts(node)
    if parts is None:
        return None
    weight, bias, transposed = parts
    if not is_parameter(weight) or not (bias is None or is_parameter(bias)):
        return None
    name = str(weight.target)  # type: ignore[attr-defined]
    return Linear(node, name, None if bias is None else str(bias.target), transposed)  # type: ignore[attr-defined]


def site_node(rewritten: Rewritten, site_id: str) -> Node:
    """The graph's call of the site's module."""
    module = rewritten.attention(site_id)
    node: Node
    for node in rewritten.module.graph.nodes:
        if node.op == "call_module":
            called = rewritten.module.get_submodule(str(node.target))
            if called is module:
                return node
    raise AssertionError(f"{site_id} has a module but no call")  # substitute made both


def owned(module: GraphModule, linear: Linear) -> bool:
    """Whether the layer's parameters are used by this node alone (no tied weights)."""
    tensors = {id(_get(module, name)) for name in linear.names}
    uses = 0
    for node in module.graph.nodes:
        if node.op == "get_attr" and id(_get(module, str(node.target))) in tensors:
            uses += max(len(node.users), 1)
    return uses == len(linear.names)


def _get(module: nn.Module, name: str) -> object:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def output_projection(rewritten: Rewritten, site_id: str) -> tuple[Linear | None, str]:
    """(the linear layer that reads exactly the merged heads of a site, "") or (None, why not)."""
    node, site = site_node(rewritten, site_id), rewritten.attention(site_id).site
    labels: list[str] = ["B", "H", "T", "E"]
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None, f"the attention output has {len(users)} users"
        node = users[0]
        linear = as_linear(node)
        if linear is not None:
            break
        if node.target in _MOVES:
            labels = _moved(labels, node)
        elif node.target in _VIEWS:
            labels = _viewed(labels, node, site)
        elif node.target not in _SAME:
            return None, f"{node.target} stands before any linear layer"
        if not labels:
            return None, "the heads are not merged in their order before the projection"
    if labels[-1] != "HE":
        return None, "the heads are not merged before the linear layer"
    if not owned(rewritten.module, linear):
        return None, "the projection's weights are shared with another place"
    return linear, ""


def _moved(labels: list[str], node: Node) -> list[str]:
    if node.target is _ATEN.permute.default:
        order = [int(i) % len(labels) for i in node.args[1]]  # type: ignore[union-attr, arg-type]
        return [labels[i] for i in order]
    made = list(labels)
    a, b = (int(i) % len(labels) for i in node.args[1:3])  # type: ignore[arg-type]
    made[a], made[b] = made[b], made[a]
    return made


def _viewed(labels: list[str], node: Node, site: AttentionSite) -> list[str]:
    """Labels after a view: the heads must become one last axis [.., H, E] -> [.., HE].

    Views that change nothing, and those to [B * H, T, E] and back, are passed.
    """
    value, before = node.meta.get("val"), node.args[0].meta.get("val")  # type: ignore[union-attr]
    if value is None:
        return []
    heads, width = site.dims.H, site.dims.E
    if before is not None and list(map(str, before.shape)) == list(map(str, value.shape)):
        return labels
    if labels == ["B", "H", "T", "E"] and value.dim() == 3 and value.shape[-1] == width:
        return ["BH", "T", "E"]
    if (
        labels == ["BH", "T", "E"]
        and value.dim() == 4
        and tuple(value.shape[1::2]) == (heads, width)
    ):
        return ["B", "H", "T", "E"]
    if value.shape[-1] == heads * width and (labels[-1] == "HE" or labels[-2:] == ["H", "E"]):
        return ["rest"] * (value.dim() - 1) + ["HE"]
    return []


def input_projections(rewritten: Rewritten, site_id: str) -> list[Linear]:
    """The linear layers that make q, k and v, where each serves this site alone."""
    found: dict[str, Linear] = {}
    for argument in site_node(rewritten, site_id).args[:3]:
        linear = _back(argument)
        if linear is not None and owned(rewritten.module, linear):
            found[linear.weight] = linear
    return list(found.values())


def _back(value: object) -> Linear | None:
    node = value
    while isinstance(node, Node) and node.op == "call_function":
        linear = as_linear(node)
        if linear is not None:
            return linear
        if node.target not in _BACK and getattr(node.target, "__name__", "") != _GETITEM:
            return None
        node = node.args[0]
    return None


def hidden_nodes(rewritten: Rewritten) -> list[Node]:
    """For each site the residual sum after its projection (else the site), in graph order."""
    found = []
    for site in rewritten.sites:
        node = site_node(rewritten, site.id)
        found.append(next((n for n in _ahead(node) if _is_sum(n)), node))
    return found


def _ahead(node: Node) -> Iterator[Node]:
    """The nodes after `node` as long as each has one user, at most twelve."""
    for _ in range(12):
        if len(node.users) != 1:
            return
        node = next(iter(node.users))
        yield node


def _is_sum(node: Node) -> bool:
    if node.target not in (_ATEN.add.Tensor, _ATEN.add_.Tensor):
        return False
    return all(isinstance(a, Node) and a.op != "get_attr" for a in node.args[:2])
