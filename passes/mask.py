"""What a mask tensor means, decided by evaluating the nodes that make it, not by their names.

A mask is read as booleans: bool as it is (True = may be seen); float where every value is 0
(seen) or very negative (hidden). It is `padding` if, for several values of the model inputs it
is made from, visible(b, i, j) = key(b, j) and static(i, j); the static part is all, causal
(j <= i + S - T) or a band. Rows in which nothing can be seen carry no information and are
skipped. Anything else is a `bias`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.evaluate import Evaluator, is_parameter, needed
from passes.mask_relative import relative_bias
from passes.mask_trials import Resize, other_size, trials
from passes.ops import HIDDEN, has_tensor, hint, val
from passes.site import Mask

BIAS, UNKNOWN = Mask(bias=True), Mask(unknown=True)


@dataclass(frozen=True)
class Frame:
    """Sizes of the attention the mask is for, possibly symbolic."""

    B: Any
    T: Any
    S: Any

    @classmethod
    def of(cls, q: Node, k: Node) -> Frame:
        """From q [B, H, T, D] and k [B, G, S, D]."""
        return cls(val(q).shape[0], val(q).shape[2], val(k).shape[2])


def classify(
    module: GraphModule, node: Node, frame: Frame, examples: Mapping[Node, Any]
) -> tuple[Mask, str]:
    """The meaning of mask `node` (broadcastable to [B, H, T, S]) and a remark ("" if none).

    `examples` holds the example value of every placeholder. Never raises for a mask it can not
    evaluate: that one is `unknown`.
    """
    steps = needed([node], set())
    inputs = [n for n in steps if n.op == "placeholder"]
    if any(_trained(module, n) for n in steps):
        found = relative_bias(module, node, examples, inputs)
        return replace(BIAS, relative=found), "made from trained parameters"
    if any(has_tensor(n) and val(n).is_floating_point() and val(n).ndim > 4 for n in inputs):
        return BIAS, "made from activations"
    try:
        mask = _at_size(module, node, frame, examples, inputs, None)
        resize = other_size(examples, steps)
        if mask.bias:
            return replace(mask, relative=relative_bias(module, node, examples, inputs)), ""
        if resize is None or mask.unknown:
            return mask, ""
        return _agree(module, node, frame, examples, inputs, mask, resize)
    except Exception as error:
        return UNKNOWN, f"could not be evaluated: {str(error).splitlines()[0][:200]}"


def _trained(module: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return any(True for _ in module.get_submodule(str(node.target)).parameters())
    return is_parameter(module, node)


def _agree(
    module: GraphModule,
    node: Node,
    frame: Frame,
    examples: Mapping[Node, Any],
    inputs: list[Node],
    mask: Mask,
    resize: Resize,
) -> tuple[Mask, str]:
    """The meaning at a second size, if it predicts what was seen at the first."""
    try:
        other = _at_size(module, node, frame, examples, inputs, resize)
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        return mask, f"checked at the example's sizes only: {reason}"
    T, S = hint(frame.T), hint(frame.S)
    same = bool((static_of(mask, T, S) == static_of(other, T, S)).all())
    if other.bias or other.unknown or not same or mask.padding != other.padding:
        return UNKNOWN, "its meaning changes with the sizes"
    return other, ""


def _at_size(
    module: GraphModule,
    node: Node,
    frame: Frame,
    examples: Mapping[Node, Any],
    inputs: list[Node],
    resize: Resize | None,
) -> Mask:
    at = resize.size if resize else hint
    B, T, S = at(frame.B), at(frame.T), at(frame.S)
    values = {n: resize.value(n, v) for n, v in examples.items()} if resize else dict(examples)
    seen: list[torch.Tensor] = []
    for given in trials(inputs, values, needed([node], set())):
        out = Evaluator(module, given, real_sizes=resize is not None)(node)
        visible = as_visible(out)
        if visible is None:
            return BIAS
        one = _one_head(visible)
        if one is None:
            return BIAS
        seen.append(one.expand(B, T, S))
    return _factor(seen, bool(inputs))


def as_visible(mask: torch.Tensor) -> torch.Tensor | None:
    """Bool tensor of what may be seen; None if `mask` is a general bias."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return None
    zero, hidden = mask == 0, mask <= HIDDEN
    return zero if bool((zero | hidden).all()) else None


def _one_head(visible: torch.Tensor) -> torch.Tensor | None:
    """[B or 1, T or 1, S] if all heads see the same, else None."""
    while visible.ndim < 4:
        visible = visible.unsqueeze(0)
    first = visible[:, :1]
    return first[:, 0] if bool((visible == first).all()) else None


def _factor(seen: Iterable[torch.Tensor], from_inputs: bool) -> Mask:
    """The facts behind visible [B, T, S] of several trials."""
    seen = list(seen)
    static = torch.stack([s.any(0) for s in seen]).any(0)
    facts = static_facts(static)
    if not from_inputs and all(bool((s == static).all()) for s in seen):
        return facts
    varied = False
    for visible in seen:
        keys = key_part(visible, static)
        expected = keys.unsqueeze(1) & static
        rows = visible.any(-1) & expected.any(-1)
        if not bool((visible == expected)[rows].all()):
            return BIAS
        varied = varied or not bool(keys.all())
    if facts.bias:
        return facts
    # An input that never hides a key was not understood.
    return Mask(facts.causal, True, facts.window) if varied else UNKNOWN


def key_part(visible: torch.Tensor, static: torch.Tensor) -> torch.Tensor:
    """[B, S]: keys that every row sees which may see them and sees anything at all."""
    counts = static & visible.any(-1, keepdim=True)
    return (visible | ~counts).all(1) & counts.any(1)


def static_facts(visible: torch.Tensor) -> Mask:
    """The facts of visible [T, S]: none, causal, window (with causal if it is one-sided), bias."""
    T, S = visible.shape
    if bool(visible.all()):
        return Mask()
    candidates = [Mask(causal=True)]
    if T == S and bool(visible.any()):
        i, j = visible.nonzero(as_tuple=True)
        left, right = int((i - j).max()), int((j - i).max())
        if left >= 0 and right >= 0:
            candidates.append(Mask(causal=right == 0, window=(left, right)))
    for facts in candidates:
        if bool((static_of(facts, T, S) == visible).all()):
            return facts
    return BIAS


def static_of(mask: Mask, T: int, S: int) -> torch.Tensor:
    """What the static facts of `mask` let be seen, bool [T, S]."""
    i, j = torch.arange(T).unsqueeze(1), torch.arange(S)
    visible = torch.ones(T, S, dtype=torch.bool)
    if mask.causal:
        visible &= j <= i + (S - T)
    if mask.window is not None:
        visible &= (j >= i - mask.window[0]) & (j <= i + mask.window[1])
    return visible
