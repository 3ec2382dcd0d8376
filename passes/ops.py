"""What a graph node computes, whatever its spelling: overload, function, method or module."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from torch.fx import Node

Key = int | str

_ALIASES: Final = {
    "_softmax": "softmax",
    "special_softmax": "softmax",
    "truediv": "div",
    "itruediv": "div",
    "true_divide": "div",
    "divide": "div",
    "imul": "mul",
    "multiply": "mul",
    "iadd": "add",
    "isub": "sub",
    "subtract": "sub",
    "reshape": "view",
    "_unsafe_view": "view",
    "view_as": "view",
    "reshape_as": "view",
    "flatten": "view",
    "unflatten": "view",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "_to_copy": "to",
    "type_as": "to",
    "float": "to",
    "half": "to",
    "double": "to",
    "bfloat16": "to",
    "type": "to",
    "clone": "contiguous",
    "alias": "contiguous",
    "lift_fresh_copy": "contiguous",
    "native_dropout": "native_dropout",
    "feature_dropout": "dropout",
    "expand_as": "expand",
    "broadcast_to": "expand",
    "matrix_H": "mT",
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "convolution": "conv",
    "scaled_dot_product_attention": "sdpa",
}
_MODULES: Final[dict[type[nn.Module], str]] = {
    nn.Softmax: "softmax",
    nn.Dropout: "dropout",
    nn.Identity: "contiguous",
    nn.Linear: "linear",
    nn.LayerNorm: "layer_norm",
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
}
PERMUTES: Final = frozenset({"transpose", "permute", "movedim", "t", "mT", "T", "adjoint"})
COPIES: Final = frozenset({"contiguous", "to"})
LAYOUT: Final = PERMUTES | COPIES | {"view", "unsqueeze", "squeeze"}
# Nodes that read the sizes of a tensor, never its values.
SHAPE_ONLY: Final = frozenset(
    {"sym_size", "size", "dim", "numel", "sym_numel", "sym_stride", "_assert_tensor_metadata"}
    | {"new_ones", "new_zeros", "new_empty", "new_full", "new_tensor", "empty_like"}
    | {"zeros_like", "ones_like", "full_like", "getattr"}
)
# Largest value that a boolean mask writes into the logits to hide a key.
HIDDEN: Final = -1e4


def op_of(node: Node) -> str:
    """The family of `node`: "matmul", "softmax", "view" ...; "" for inputs and outputs.

    A trailing underscore (in place) is dropped; an operator that is not torch's own keeps its
    namespace.
    """
    if node.op == "call_module":
        return _module_op(node)
    if node.op == "call_method":
        return _family(str(node.target))
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    if node.target is getattr:  # x.mT is a transpose, x.shape is not
        return str(node.args[1]) if node.args[1] in PERMUTES else "getattr"
    if schema is None:
        return _family(getattr(node.target, "__name__", str(node.target)))
    space, name = schema.name.split("::")
    return _family(name) if space in ("aten", "prims") else f"{space}.{name}"


def _family(name: str) -> str:
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _ALIASES.get(name, name)


def _module_op(node: Node) -> str:
    module = node.graph.owning_module
    if module is None:
        return "module"
    return _MODULES.get(type(module.get_submodule(str(node.target))), "module")


def is_inplace(node: Node) -> bool:
    """Whether `node` writes into its first argument."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and bool(schema is not None and schema.is_mutable)


def submodule_of(node: Node) -> nn.Module | None:
    """The module a ``call_module`` node calls, else None."""
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if node.op == "call_module" and owner else None


def arg(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def source(node: Node) -> Node | None:
    """The first argument, if it is a node."""
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    return first if isinstance(first, Node) else None


def val(node: Node) -> torch.Tensor:
    """The fake tensor that `node` was traced with."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), node
    return value


def has_tensor(node: Any) -> bool:
    """Whether `node` is a node that yields one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def key(size: Any) -> Key:
    """A size that compares without adding guards: an int, or the text of its expression."""
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        return int(expr) if expr.is_number else str(expr)
    return int(size)


def shape(node: Node) -> tuple[Key, ...]:
    """Sizes of the tensor as comparable keys."""
    return tuple(key(s) for s in val(node).shape)


def hint(size: Any) -> int:
    """The size in the example."""
    if isinstance(size, torch.SymInt):
        found = size.node.hint
        return int(found) if found is not None else 2
    return int(size)


def sizes(node: Node) -> tuple[int, ...]:
    """Sizes of the tensor in the example."""
    return tuple(hint(s) for s in val(node).shape)


def permutation(node: Node) -> tuple[int, ...] | None:
    """Of a transposing node: output axis -> input axis. None if it is not one.

    Found by running the node on a tensor whose sizes are all different.
    """
    inner = source(node)
    if op_of(node) not in PERMUTES or inner is None or not has_tensor(inner):
        return None
    probe = torch.empty(tuple(range(1, val(inner).ndim + 1)), device="meta")
    rest = [a for a in node.args[1:]]
    if node.op == "call_method":
        out = getattr(probe, str(node.target))(*rest, **node.kwargs)
    else:
        assert callable(node.target)
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("input", "self")}
        out = node.target(probe, *rest, **kwargs)
    return tuple(s - 1 for s in out.shape)
