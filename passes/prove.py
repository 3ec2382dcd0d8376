"""A match is a hypothesis: run both sides on random numbers and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.evaluate import Evaluator, needed
from passes.ops import has_tensor, sizes, val

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_ROUNDS = 2


def prove(
    module: GraphModule,
    old: Node,
    new: Node,
    made: Sequence[Node],
    examples: Mapping[Node, Any],
) -> str | None:
    """None if node `new` computes what `old` does, else a sentence.

    `made` are the nodes of the new side. Both run from fresh random values at every old node
    that the new side reads (q, k, v and mask parts), in float64 where the graph permits, at the
    example's sizes, without dropout. Rows that are not finite in `old` (fully masked) are
    skipped.
    """
    border = _border(made, old)
    for _ in range(_ROUNDS):
        try:
            verdict = _round(module, old, new, border, examples, double=True)
        except Exception:
            try:
                verdict = _round(module, old, new, border, examples, double=False)
            except Exception as error:
                return f"proof could not be run: {str(error).splitlines()[0][:200]}"
        if verdict is not None:
            return verdict
    return None


def _border(made: Sequence[Node], old: Node) -> list[Node]:
    """Old nodes that the new side reads and on which `old` depends."""
    own = set(made)
    read = {n for m in made for n in m.all_input_nodes if n not in own and has_tensor(n)}
    return [n for n in needed([old], read) if n in read]


def _round(
    module: GraphModule,
    old: Node,
    new: Node,
    border: list[Node],
    examples: Mapping[Node, Any],
    *,
    double: bool,
) -> str | None:
    given = {**examples, **{n: _random(n) for n in border}}
    want = Evaluator(module, given, double=double)(old)
    got = Evaluator(module, given, double=double)(new)
    if want.shape != got.shape:
        return f"proof failed: shape {tuple(got.shape)} for {tuple(want.shape)}"
    rows = torch.isfinite(want)
    if not bool(rows.any()):
        return "proof failed: no row is finite"
    error = float((want - got)[rows].abs().max())
    size = float(want[rows].abs().max())
    if not error <= _TOLERANCE.get(want.dtype, 1e-4) * max(size, 1e-3):
        return f"proof failed: max error {error:.2g} at values up to {size:.2g}"
    return None


def _random(node: Node) -> torch.Tensor:
    """Normal numbers, random bools (mostly True) or 0/1."""
    shape, dtype = sizes(node), val(node).dtype
    if dtype == torch.bool:
        return torch.rand(shape) < 0.7
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2, shape).to(dtype)
