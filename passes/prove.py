"""A match is a hypothesis: run both sides on random numbers and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.evaluate import Evaluator, needed
from passes.ops import HIDDEN, has_tensor, sizes, val
from passes.rebuild import Rebuilt

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_ROUNDS = 2
_DRAWS = 20  # of a round: a random mask may hide everything
_NO_ROW = "proof failed: no row is finite"


def prove(
    module: GraphModule,
    old: Node,
    new: Rebuilt,
    made: Sequence[Node],
    examples: Mapping[Node, Any],
) -> str | None:
    """None if node `new.out` computes what `old` does, else a sentence.

    `made` are the nodes of the new side. Both run from fresh random values at every old node
    that the new side reads (q, k, v and mask parts), in float64 where the graph permits, at the
    example's sizes, without dropout. Rows in which no key can be seen are skipped: what they
    hold depends on the spelling and means nothing.
    """
    border = _border(made, old)
    passed, verdict = 0, None
    for _ in range(_DRAWS):
        verdict = _any_precision(module, old, new, border, examples)
        if verdict is None:
            passed += 1
        elif verdict != _NO_ROW:
            return verdict
        if passed == _ROUNDS:
            return None
    return verdict or _NO_ROW


def _any_precision(
    module: GraphModule, old: Node, new: Rebuilt, border: list[Node], examples: Mapping[Node, Any]
) -> str | None:
    """One round in float64, or as it is where the graph does not run in float64."""
    try:
        return _round(module, old, new, border, examples, double=True)
    except Exception:
        try:
            return _round(module, old, new, border, examples, double=False)
        except Exception as error:
            return f"proof could not be run: {str(error).splitlines()[0][:200]}"


def _border(made: Sequence[Node], old: Node) -> list[Node]:
    """Old nodes that the new side reads and on which `old` depends."""
    own = set(made)
    values = [m for m in made if has_tensor(m)]  # the others read sizes
    read = {n for m in values for n in m.all_input_nodes if n not in own and has_tensor(n)}
    border = [n for n in needed([old], read) if n in read]
    # A node that follows from the others is not free.
    for node in list(border):
        others = set(border) - {node}
        steps = needed([node], others)
        if others & set(steps) and not any(s.op == "placeholder" for s in steps):
            border.remove(node)
    return border


def _round(
    module: GraphModule,
    old: Node,
    new: Rebuilt,
    border: list[Node],
    examples: Mapping[Node, Any],
    *,
    double: bool,
) -> str | None:
    given = {**examples, **{n: _random(n) for n in border}}
    want = Evaluator(module, given, double=double)(old)
    evaluator = Evaluator(module, given, double=double)
    got = evaluator(new.out)
    if want.shape != got.shape:
        return f"proof failed: shape {tuple(got.shape)} for {tuple(want.shape)}"
    rows = _rows(module, new, evaluator) & torch.isfinite(want)
    if not bool(rows.any()):
        return _NO_ROW
    error = float((want - got)[rows].abs().max())
    size = float(want[rows].abs().max())
    if not error <= _TOLERANCE.get(want.dtype, 1e-4) * max(size, 1e-3):
        return f"proof failed: max error {error:.2g} at values up to {size:.2g}"
    return None


def _rows(module: GraphModule, new: Rebuilt, evaluator: Evaluator) -> torch.Tensor:
    """Bool of the output's shape: True in rows that see a key."""
    result = evaluator(new.sdpa)
    mask = new.sdpa.args[3]
    seen = torch.ones_like(result)
    if isinstance(mask, Node):
        value = evaluator(mask)
        visible = value if value.dtype == torch.bool else value > HIDDEN / 2
        seen = visible.any(-1, keepdim=True).to(result.dtype).expand_as(result).contiguous()
    # The layout after the SDPA node, run on the marks.
    return torch.as_tensor(Evaluator(module, {**evaluator.given, new.sdpa: seen})(new.out)) > 0.5


def _random(node: Node) -> torch.Tensor:
    """Normal numbers, random bools (mostly True) or 0/1."""
    shape, dtype = sizes(node), val(node).dtype
    if dtype == torch.bool:
        return torch.rand(shape) < 0.7
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2, shape).to(dtype)
