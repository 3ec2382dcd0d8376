"""Computes with torch, before import, what does not depend on the inputs.

TVM can fold constants too, but compiles a kernel for each. Masks, position ids, rotary tables and
relative position biases go away here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

if TYPE_CHECKING:
    from torch.fx import Node

# A result larger than this is not stored in the artifact but computed when it runs.
LARGEST_BYTES = 4 * 1024 * 1024
# Not functions of their arguments.
_RANDOM = ("rand", "bernoulli", "dropout", "empty", "exponential", "normal", "multinomial")
_FORMS = "attnform_"


def fold_constants(ep: ExportedProgram) -> int:
    """Replace input-independent nodes of `ep` (in place) by constants; how many constants."""
    known = stored_values(ep)
    folded: dict[Node, torch.Tensor] = {}
    for node in ep.graph.nodes:
        value = _value(node, known)
        if value is not None:
            known[node] = folded[node] = value
    made = 0
    for node in folded:
        if any(user not in folded for user in node.users):
            _become_constant(ep, node, folded[node], made)
            made += 1
    for node in reversed(list(ep.graph.nodes)):
        if node.op == "call_function" and not node.users and node in folded:
            ep.graph.erase_node(node)
    return made


def stored_values(ep: ExportedProgram) -> dict[Node, torch.Tensor]:
    """Values of the parameters, buffers and constants that no call changes."""
    signature = ep.graph_signature
    changed = set(signature.buffers_to_mutate.values())
    tensors = {**ep.constants, **ep.state_dict}
    values = {}
    for spec in signature.input_specs:
        stored = tensors.get(spec.target) if spec.target else None
        if isinstance(stored, torch.Tensor) and spec.target not in changed:
            values[spec.arg.name] = stored.detach()
    return {
        n: values[n.name]
        for n in ep.graph.nodes
        if n.op == "placeholder" and n.name in values and not values[n.name].is_meta
    }


def _value(node: Node, known: dict[Node, Any]) -> torch.Tensor | None:
    if node.op != "call_function" or any(n not in known for n in node.all_input_nodes):
        return None
    shown, name = node.meta.get("val"), getattr(node.target, "__name__", "")
    if not isinstance(shown, torch.Tensor) or name.startswith(_FORMS):
        return None
    if any(word in name for word in _RANDOM) or shown.numel() * shown.itemsize > LARGEST_BYTES:
        return None
    if any(_wanted_whole(n, known[n]) for n in node.all_input_nodes):
        return None
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: known[n])
    kwargs = {k: v for k, v in kwargs.items() if k not in ("pin_memory", "layout")}
    with torch.no_grad():
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    return result.contiguous() if isinstance(result, torch.Tensor) else None


def _wanted_whole(node: Node, value: torch.Tensor) -> bool:
    """A large weight with several readers: a folded copy would store it twice."""
    shared = node.op == "placeholder" and len(node.users) > 1
    return shared and value.numel() * value.itemsize > LARGEST_BYTES // 64


def _become_constant(ep: ExportedProgram, node: Node, value: torch.Tensor, number: int) -> None:
    # Cloned: the value may be a view of a weight.
    node.replace_all_uses_with(add_constant(ep, value.clone(), f"folded_{number}"))


def add_constant(ep: ExportedProgram, value: torch.Tensor, name: str) -> Node:
    """A placeholder of `ep` that holds `value`."""
    graph, first = ep.graph, next(iter(ep.graph.nodes))
    with graph.inserting_before(first):
        holder: Node = graph.placeholder(name)
    holder.meta["val"] = value
    spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(holder.name), name, None)
    ep.graph_signature.input_specs.insert(0, spec)
    ep.constants[name] = value
    return holder
