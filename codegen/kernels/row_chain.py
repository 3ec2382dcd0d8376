"""Norms and linear layers whose rows do not depend on each other: plain TE, the meaning.

Where rows are many, codegen/graph_passes/row_chain.py makes such a chain of the linear layers one
behind the other with what stands between them, and codegen/schedules/row_chain.py takes it through
the caches, some rows at a time, so that what lies between goes through no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tvm import te

from codegen.kernels import norm
from codegen.kernels.activations import SCALAR
from codegen.kernels.vector_math import at_least
from codegen.target import Target

NAME = "row_chain"  # of the rule and of kernels
# Relax operator -> the scalar function behind a product.
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    **SCALAR,
    "relax.nn.relu": lambda x: at_least(x, 0.0),
}


@dataclass(frozen=True)
class Layer:
    """A norm or none ("layer_norm", "rms_norm"), a product, and what follows it.

    `act` is a name of `ACTIVATIONS` or "". `add` in the end: "" nothing, "given" an input of the
    kernel, "normed" the rows that the chain's norm has read.
    """

    norm: str = ""
    eps: float = 0.0
    bias: bool = False
    act: str = ""
    add: str = ""


@dataclass(frozen=True)
class Tensors:
    """The inputs of one layer; None where it has none.

    gamma and beta [K], panels [N / nt, K, nt], bias [N], added [R, N].
    """

    gamma: Any
    beta: Any
    panels: Any
    bias: Any
    added: Any


@dataclass(frozen=True)
class ChainFacts:
    """What the tensors of a chain do not say. Inputs are x [R, K] and those of each layer."""

    layers: tuple[Layer, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChainFacts:
        """Inverse of `to_json`."""
        return cls(tuple(Layer(**layer) for layer in data["layers"]))

    def split(self, rest: list[Any]) -> list[Tensors]:
        """The inputs after x by layer."""
        rest = list(rest)

        def take(here: bool) -> Any:
            return rest.pop(0) if here else None

        return [
            Tensors(
                take(layer.norm != ""),
                take(layer.norm == "layer_norm"),
                take(True),
                take(layer.bias),
                take(layer.add == "given"),
            )
            for layer in self.layers
        ]


def define(facts: ChainFacts, target: Target, x: Any, *rest: Any) -> Any:
    """The chain of x [R, K] -> [R, N]."""
    normed = x
    for number, (layer, tensors) in enumerate(
        zip(facts.layers, facts.split(list(rest)), strict=True)
    ):
        if layer.norm:
            normed, lanes = x, 2 * target.lanes
            if layer.norm == "layer_norm":
                x = norm.layer_norm(x, tensors.gamma, tensors.beta, layer.eps, lanes)
            else:
                x = norm.rms_norm(x, tensors.gamma, layer.eps, lanes)
        added = normed if layer.add == "normed" else tensors.added
        x = _product(x, layer, tensors, added, number)
    return x


def _product(x: Any, layer: Layer, tensors: Tensors, added: Any, number: int) -> Any:
    panels, rows, width = tensors.panels, int(x.shape[0]), int(tensors.panels.shape[2])
    k = te.reduce_axis((0, int(x.shape[1])), name="k")
    product = te.compute(
        (rows, int(panels.shape[0]) * width),
        lambda i, j: te.sum(x[i, k] * panels[j // width, k, j % width], axis=k),
        name=f"chain_product{number}",
    )
    other = None if added is None else lambda i, j: added[i, j]
    return te.compute(
        product.shape,
        lambda i, j: behind(product[i, j], (i, j), layer, tensors.bias, other),
        name=f"chain_out{number}",
    )


def behind(value: Any, at: tuple[Any, Any], layer: Layer, bias: Any, added: Any) -> Any:
    """What follows the sum `value` of row and column `at`; added(row, column) or None."""
    value = value if bias is None else value + bias[at[1]]
    value = ACTIVATIONS[layer.act](value) if layer.act else value
    return value if added is None else value + added(*at)
