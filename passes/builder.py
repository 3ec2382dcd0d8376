"""Insert nodes into a graph with their fake values and the origin of the node they replace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from passes.ops import key, op_of, permutation, shape, source, val

aten = torch.ops.aten
_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack")


class Builder:
    """Inserts nodes before `anchor`; `made` are the new ones."""

    def __init__(self, anchor: Node) -> None:
        self.graph: Graph = anchor.graph
        self.anchor = anchor
        self.made: list[Node] = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node with its ``meta["val"]``; torch's own error if the sizes do not fit."""
        fake_args = map_arg(args, lambda n: n.meta["val"])
        fake_kwargs = map_arg(kwargs, lambda n: n.meta["val"])
        value = target(*fake_args, **fake_kwargs)
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: self.anchor.meta[k] for k in _ORIGIN if k in self.anchor.meta}
        node.meta["val"] = value
        self.made.append(node)
        return node

    def discard(self) -> None:
        """Remove the new nodes again."""
        for node in reversed(self.made):
            if not node.users:
                self.graph.erase_node(node)
        self.made = []

    def clone(self, node: Node, new_source: Node) -> Node:
        """A copy of layout node `node` on another first argument."""
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("input", "self")}
        if node.op == "call_method":
            with self.graph.inserting_before(self.anchor):
                made = self.graph.call_method(str(node.target), (new_source, *node.args[1:]))
            made.kwargs = node.kwargs
            fake = map_arg((new_source, *node.args[1:]), lambda n: n.meta["val"])
            value = getattr(fake[0], str(node.target))(*fake[1:], **node.kwargs)
            made.meta = {**node.meta, "val": value}
            self.made.append(made)
            return made
        return self.call(node.target, new_source, *node.args[1:], **kwargs)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """`node` in `dtype`."""
        return node if val(node).dtype == dtype else self.call(aten.to.dtype, node, dtype)

    def size(self, node: Node, axis: int) -> Any:
        """A size as an argument: an int, or a node that reads it."""
        found = key(val(node).shape[axis])
        return found if isinstance(found, int) else self.call(aten.sym_size.int, node, axis)

    def permute(self, node: Node, order: Sequence[int]) -> Node:
        """`node` with output axis i taken from `order[i]`; looks through an inverse permutation."""
        order = tuple(order)
        if order == tuple(range(len(order))):
            return node
        inner, perm = source(node), permutation(node)
        if inner is not None and perm is not None:
            combined = tuple(perm[i] for i in order)
            if combined == tuple(range(len(combined))):
                return inner
            order, node = combined, inner
        swapped = [i for i, o in enumerate(order) if i != o]
        if len(swapped) == 2:
            return self.call(aten.transpose.int, node, *swapped)
        return self.call(aten.permute.default, node, list(order))

    def unsqueeze(self, node: Node, axis: int) -> Node:
        """A new axis of size 1."""
        return self.call(aten.unsqueeze.default, node, axis)

    def reshape(self, node: Node, wanted: Sequence[Any]) -> Node:
        """`node` as sizes `wanted` (ints, size nodes, one -1); undoes an earlier view if it can."""
        keys = tuple(_arg_key(w) for w in wanted)
        if _fits(shape(node), keys):
            return node
        inner, seen = source(node), node
        while inner is not None and op_of(seen) in ("view", "contiguous"):
            if _fits(shape(inner), keys):
                return inner
            seen, inner = inner, source(inner)
        return self.call(aten.reshape.default, node, list(wanted))


def _arg_key(size: Any) -> int | str:
    return key(size.meta["val"]) if isinstance(size, Node) else int(size)


def _fits(have: tuple[int | str, ...], want: tuple[int | str, ...]) -> bool:
    return len(have) == len(want) and all(w in (-1, h) for h, w in zip(have, want, strict=True))
