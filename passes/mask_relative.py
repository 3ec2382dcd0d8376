"""Whether a bias depends on the difference of places alone, proved by evaluating it.

Trained parameters get random values meanwhile, so that what is found is due to how the bias is
made and stays true in training (a table of zeros would be anything).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.evaluate import Evaluator, attribute, is_parameter, needed
from passes.mask_trials import trials
from passes.relative import find_relative

_LARGE = 1 << 23  # values of a bias from which on it is evaluated less often
_FEW = 4  # the example, all keys seen, none, padding on the right


def relative_bias(
    module: GraphModule, node: Node, examples: Mapping[Node, Any], inputs: list[Node]
) -> tuple[int, ...] | None:
    """`Mask.relative` of the mask `node` at the example's sizes; None where nothing was found.

    `examples` holds the example value of every placeholder; the mask is made from `inputs`.
    """
    steps = needed([node], set())
    if any(n.op == "call_module" for n in steps):
        return None

    def biases() -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)  # torch.seed() would change the user's
        drawn = {n: _random(module, n, generator) for n in steps if is_parameter(module, n)}
        size = 0
        for turn, given in enumerate(trials(inputs, examples, steps)):
            if size > _LARGE and turn >= _FEW:
                return
            bias = Evaluator(module, {**given, **drawn})(node)
            size = bias.numel()
            yield bias

    try:
        return find_relative(biases())
    except Exception:  # a mask that can not be evaluated is a general bias
        return None


def _random(module: GraphModule, node: Node, generator: torch.Generator) -> torch.Tensor:
    value = attribute(module, node)
    if not value.is_floating_point():
        return value.detach()
    return torch.randn(value.shape, generator=generator).to(value)
