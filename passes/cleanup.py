"""Copy a graph, fill in fake values, remove in-place writes and dead nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.graph_copy import deep_copy
from passes.ops import has_tensor, hint, is_inplace, op_of, source
from passes.trace_inputs import check_call
from passes.traced import Traced

_VIEWS = frozenset({"view", "slice", "select", "transpose", "permute", "expand", "unsqueeze"})


def copy_module(module: GraphModule) -> GraphModule:
    """A new graph on the same parameters, buffers, submodules and input checks."""
    copied = fx.GraphModule(module, deep_copy(module.graph))
    copied.meta.update(module.meta)
    torch.nn.Module.train(copied, module.training)
    if check_call in module._forward_pre_hooks.values():
        copied.register_forward_pre_hook(check_call, with_kwargs=True)
    return copied


def examples_of(traced: Traced, module: GraphModule) -> dict[Node, Any]:
    """The example value of every placeholder of `module`, a copy of the traced graph."""
    nodes = list(module.graph.find_nodes(op="placeholder"))
    names = [n.name for n in nodes]
    spec = getattr(module.graph._codegen, "pytree_info", None)
    kwargs = dict(traced.example_kwargs)
    if spec is not None:
        order = spec.in_spec.unflatten([None] * spec.in_spec.num_leaves)[1]
        leaves = pytree.tree_leaves((traced.example_args, {k: kwargs[k] for k in order}))
        return {n: _at_traced_size(n, v) for n, v in zip(nodes, leaves, strict=True)}
    values = dict(zip(names, traced.example_args, strict=False)) | kwargs
    found = {n: values.get(str(n.target), values.get(n.name, _default(n))) for n in nodes}
    return {n: _at_traced_size(n, v) for n, v in found.items()}


def _at_traced_size(node: Node, value: Any) -> Any:
    """`value` repeated along axes of size one that the trace widened (a dynamic batch of one)."""
    traced = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(traced, torch.Tensor):
        return value
    times = [
        hint(want) if have == 1 else 1 for have, want in zip(value.shape, traced.shape, strict=True)
    ]
    return value.repeat(times) if any(t != 1 for t in times) else value


def _default(node: Node) -> Any:
    return node.args[0] if node.args else None


def ensure_values(module: GraphModule, examples: dict[Node, Any]) -> None:
    """Give every node a fake value where the tracer left none (symbolic_trace)."""
    if all("val" in n.meta for n in module.graph.nodes if n.op not in ("output", "get_attr")):
        for node in module.graph.find_nodes(op="get_attr"):
            if "val" not in node.meta:
                node.meta["val"] = _meta_of(module, node)
        return
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(module, mode).propagate(*examples.values())


def _meta_of(module: GraphModule, node: Node) -> Any:
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    for other in module.graph.nodes:
        mode = getattr(other.meta.get("val"), "fake_mode", None)
        if mode is not None and isinstance(value, torch.Tensor):
            return mode.from_tensor(value)
    return value


def functionalise(module: GraphModule) -> None:
    """Replace in-place arithmetic on fresh tensors (``scores.mul_(s)``) by its pure spelling.

    Writes into inputs, parameters and views are left as they are.
    """
    for node in list(module.graph.nodes):
        target = source(node)
        if not is_inplace(node) or target is None or op_of(target) in _VIEWS | {"", "getitem"}:
            continue
        pure = _pure(node)
        if pure is None or not has_tensor(node):
            continue
        node.target = pure
        later = _after(node)
        target.replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _pure(node: Node) -> Any:
    if node.op == "call_method":
        return str(node.target)[:-1]
    schema = node.target._schema  # type: ignore[union-attr]
    packet = getattr(torch.ops.aten, schema.name.split("::")[1][:-1], None)
    return getattr(packet, schema.overload_name or "default", None) if packet else None


def _after(node: Node) -> set[Node]:
    found, passed = set(), False
    for other in node.graph.nodes:
        if passed:
            found.add(other)
        passed = passed or other is node
    return found


def drop_dead(module: GraphModule) -> None:
    """Erase pure nodes that nothing uses (averaged weights that are not returned)."""
    for node in reversed(list(module.graph.nodes)):
        if _is_pure(node) and _only_checked(node):
            drop_asserts([node])
            module.graph.erase_node(node)


def _only_checked(node: Node) -> bool:
    return all(op_of(u) == "_assert_tensor_metadata" for u in node.users)


def _is_pure(node: Node) -> bool:
    op = op_of(node)
    if node.op not in ("call_function", "call_method") or is_inplace(node):
        return False
    return (
        not op.startswith(("_assert", "sym_constrain"))
        and "batch_norm" not in op
        and (op != "set_grad_enabled" and "out" not in node.kwargs)
    )


def drop_asserts(nodes: Iterable[Node]) -> None:
    """Erase the metadata checks of `nodes`."""
    for node in nodes:
        for user in list(node.users):
            if op_of(user) == "_assert_tensor_metadata":
                node.graph.erase_node(user)


def erase_unused(nodes: Iterable[Node]) -> None:
    """Erase `nodes`, last first, where nothing uses them, and what only they used."""
    for node in reversed(list(nodes)):
        if not node._erased and not node.users and node.op not in ("placeholder", "output"):
            inputs = [n for n in node.all_input_nodes if n.op not in ("placeholder", "output")]
            node.graph.erase_node(node)
            erase_dead(inputs)


def erase_dead(nodes: Iterable[Node]) -> None:
    """Erase `nodes` and their inputs as far as nothing uses them and they write nowhere."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node._erased or node.op in ("placeholder", "output") or is_inplace(node):
            continue
        if _only_checked(node):
            drop_asserts([node])
            stack.extend(node.all_input_nodes)
            node.graph.erase_node(node)
