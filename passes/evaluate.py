"""Evaluate a part of a graph on chosen values, in double precision if wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from passes.ops import SHAPE_ONLY, has_tensor, hint, is_inplace, op_of, sizes, val

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_VIEWS = ("slice", "select", "view", "unsqueeze", "getitem")


class Evaluator:
    """Computes nodes of `module` from `given` values; dropout is off.

    Sizes are the example's unless `real_sizes`, where they come from the given tensors. With
    `double` every floating tensor and dtype becomes float64.
    """

    def __init__(
        self,
        module: GraphModule,
        given: Mapping[Node, Any],
        *,
        double: bool = False,
        real_sizes: bool = False,
    ) -> None:
        self.module, self.double, self.real_sizes = module, double, real_sizes
        self.given: dict[Node, Any] = {n: self._raise(v) for n, v in given.items()}
        self.values = dict(self.given)

    def __call__(self, node: Node) -> Any:
        """The value of `node`; KeyError for an input that was not given."""
        with torch.no_grad():
            for step in needed([node], set(self.values), self.real_sizes):
                if step not in self.values:
                    self.values[step] = self._run(step)
        return self.values[node]

    def _raise(self, value: Any) -> Any:
        if self.double and isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.double()
        if self.double and isinstance(value, torch.dtype) and value in _FLOATS:
            return torch.float64
        return value

    def _run(self, node: Node) -> Any:
        if node.op == "placeholder":
            raise KeyError(f"no value for input {node.name!r}")
        if node.op == "get_attr":
            return self._raise(_attribute(self.module, str(node.target)).detach().clone())
        if not self.real_sizes and isinstance(node.meta.get("val"), torch.SymInt):
            return hint(node.meta["val"])
        family = op_of(node)
        if family == "_assert_tensor_metadata":
            return None
        args = [self._value(a, node) for a in node.args]
        kwargs = {k: self._value(v, node) for k, v in node.kwargs.items()}
        if family in ("dropout", "native_dropout"):
            return args[0] if family == "dropout" else (args[0], None)
        if family == "sdpa":
            args[4:5] = [0.0] if len(args) > 4 else []
            kwargs.pop("dropout_p", None)
            args, kwargs = _mask_like_query(args, kwargs)
        return self._call(node, args, kwargs)

    def _call(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if node.op == "call_method":
            name = str(node.target)
            if self.double and name in ("float", "half", "bfloat16"):
                name = "double"
            return self._raise(getattr(args[0], name)(*args[1:], **kwargs))
        if node.op == "call_module":
            return self.module.get_submodule(str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return self._raise(node.target(*args, **kwargs))

    def _value(self, raw: Any, user: Node) -> Any:
        def one(a: Any) -> Any:
            if not isinstance(a, Node):
                return self._raise(a)
            if a in self.values:
                return self.values[a]
            # Only the sizes of such an argument matter.
            filler = torch.zeros(sizes(a), dtype=val(a).dtype)
            return self._raise(filler)

        return map_aggregate(raw, one)


def _mask_like_query(args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """A floating mask in the dtype of the query."""
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    query = args[0] if args else kwargs["query"]
    if isinstance(mask, torch.Tensor) and mask.is_floating_point():
        if len(args) > 3:
            args[3] = mask.to(query.dtype)
        else:
            kwargs["attn_mask"] = mask.to(query.dtype)
    return args, kwargs


def needed(targets: list[Node], stop: set[Node], real_sizes: bool = False) -> list[Node]:
    """Nodes to run, in graph order, to know `targets` from `stop`.

    Nodes that write into one of them (or into a view of one) belong to them. The tensor of
    which only sizes are read is left out unless `real_sizes`.
    """
    wanted: set[Node] = set()
    stack = list(targets)
    while stack:
        while stack:
            node = stack.pop()
            if node in wanted:
                continue
            wanted.add(node)
            if node not in stop:
                stack.extend(_inputs(node, real_sizes))
        stack = [n for n in _writers(wanted - stop) if n not in wanted]
    return [n for n in targets[0].graph.nodes if n in wanted]


def _inputs(node: Node, real_sizes: bool) -> list[Node]:
    if real_sizes:
        return list(node.all_input_nodes)
    if isinstance(node.meta.get("val"), torch.SymInt):
        return []
    if op_of(node) in SHAPE_ONLY and node.args and has_tensor(node.args[0]):
        return [n for n in node.all_input_nodes if n is not node.args[0]]
    return list(node.all_input_nodes)


def _writers(nodes: set[Node]) -> list[Node]:
    """Nodes that write in place into a tensor of `nodes` or into a view taken from one."""
    found = []
    for node in nodes:
        for user in node.users:
            writes = is_inplace(user) and bool(user.args) and user.args[0] is node
            if writes or (op_of(user) in _VIEWS and any(map(is_inplace, user.users))):
                found.append(user)
    return found


def _attribute(module: GraphModule, path: str) -> torch.Tensor:
    owner, _, name = path.rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    assert isinstance(value, torch.Tensor)
    return value


def attribute(module: GraphModule, node: Node) -> torch.Tensor:
    """The tensor of a ``get_attr`` node."""
    return _attribute(module, str(node.target))


def is_parameter(module: GraphModule, node: Node) -> bool:
    """Whether `node` reads a trained parameter."""
    return node.op == "get_attr" and isinstance(attribute(module, node), torch.nn.Parameter)
