"""Merges projections of the same tokens that only attention reads: q, k and v become one product.

One kernel in place of three reads the tokens once and starts the threads once. The attention reads
its parts through views (codegen/strides.py), so nothing is copied.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from codegen.fold import add_constant, stored_values

if TYPE_CHECKING:
    from torch.fx import Node

_aten = torch.ops.aten
_VIEWS = frozenset(
    {
        "view.default", "reshape.default", "transpose.int", "permute.default",
        "unsqueeze.default", "_unsafe_view.default", "alias.default",
    }
)  # fmt: skip
_ATTENTION = "attnform_"


def merge_projections(ep: ExportedProgram) -> int:
    """Merge what can be merged in `ep` (in place); how many products went away."""
    stored, groups = stored_values(ep), defaultdict[Any, list[Any]](list)
    for node in ep.graph.nodes:
        if _mergeable(node, stored):
            biased = _bias(node) is not None
            groups[node.args[0], biased, stored[node.args[1]].dtype].append(node)
    merged = [group for group in groups.values() if len(group) > 1]
    for number, group in enumerate(merged):
        _merge(ep, group, stored, number)
    return sum(len(group) - 1 for group in merged)


def _bias(node: Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _mergeable(node: Node, stored: dict[Node, torch.Tensor]) -> bool:
    """A linear layer with a weight of its own whose result only attention reads."""
    if node.target is not _aten.linear.default:
        return False
    weight: Any = node.args[1]
    bias = _bias(node)
    if weight not in stored or not (bias is None or bias in stored):
        return False
    own = stored[weight].ndim == 2 and len(weight.users) == 1
    return own and bool(node.users) and all(_for_attention(user) for user in node.users)


def _for_attention(node: Node) -> bool:
    name = getattr(node.target, "__name__", "")
    if name.startswith(_ATTENTION):
        return True
    return name in _VIEWS and bool(node.users) and all(_for_attention(u) for u in node.users)


def _merge(
    ep: ExportedProgram, group: list[Node], stored: dict[Node, torch.Tensor], number: int
) -> None:
    graph, first = ep.graph, group[0]
    parts: list[list[Any]] = [[n.args[1] for n in group]]
    if _bias(first) is not None:
        parts.append([_bias(n) for n in group])
    shared = [
        add_constant(ep, torch.cat([stored[p] for p in part]), f"merged_{number}_{at}")
        for at, part in enumerate(parts)
    ]
    sizes = [int(stored[n].shape[0]) for n in parts[0]]
    with graph.inserting_before(first):
        whole = graph.call_function(_aten.linear.default, (first.args[0], *shared))
        split = graph.call_function(_aten.split_with_sizes.default, (whole, sizes, -1))
        whole.meta.update(first.meta)
        whole.meta["val"] = first.meta["val"].new_empty(*first.meta["val"].shape[:-1], sum(sizes))
        split.meta["val"] = [n.meta["val"] for n in group]
        for at, node in enumerate(group):
            part = graph.call_function(operator.getitem, (split, at))
            part.meta.update(node.meta)
            node.replace_all_uses_with(part)
    for node in reversed(group):
        graph.erase_node(node)
