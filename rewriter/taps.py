"""Taps: read inner values of a graph while it runs, with gradients, without changing the model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.graph_copy import deep_copy


class Tap(nn.Module):
    """Keeps the last value that came by."""

    value: Tensor | None = None

    def forward(self, value: Tensor) -> Tensor:
        """The value itself."""
        self.value = value
        return value


class Tapped:
    """A second GraphModule on the same parameters and submodules that also gives inner values.

    A submodule swapped in the original later is not seen here: make a new one then.
    """

    def __init__(self, module: GraphModule, nodes: Sequence[Node]) -> None:
        self.module = GraphModule(module, deep_copy(module.graph))
        by_name = {n.name: n for n in self.module.graph.nodes}
        self.taps = [Tap() for _ in nodes]
        for index, (tap, node) in enumerate(zip(self.taps, nodes, strict=True)):
            self.module.add_submodule(f"_tap_{index}", tap)
            with self.module.graph.inserting_after(by_name[node.name]):
                self.module.graph.call_module(f"_tap_{index}", (by_name[node.name],))
        self.module.recompile()

    def __call__(self, **batch: Tensor) -> tuple[object, list[Tensor]]:
        """(the model's outputs, the tapped values in the order of the nodes)."""
        outputs = self.module(**batch)
        values = [t.value for t in self.taps if t.value is not None]
        for tap in self.taps:
            tap.value = None
        return outputs, values
