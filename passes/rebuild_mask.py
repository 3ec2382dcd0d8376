"""One mask tensor [B or 1, H or 1, T or 1, S or 1] from everything that changed the logits."""

from __future__ import annotations

import math
import operator

import torch
from torch.fx import Node

from passes.builder import Builder, aten
from passes.contraction import Axes
from passes.match import SoftmaxMatch, Stop, Term
from passes.ops import Key, has_tensor, op_of, shape, source, val


class MaskFrames:
    """The layouts that the logits pass through, and terms brought back to the first of them."""

    def __init__(self, match: SoftmaxMatch, builder: Builder, q4: Node, heads: int | None) -> None:
        self.match, self.b, self.q4, self.heads = match, builder, q4, heads

    def assemble(self) -> Node | None:
        """The mask: bool if one term hides keys with -inf, else added to the logits; or None."""
        terms = self.match.terms
        if len(terms) == 1 and terms[0].fill == -math.inf:
            hidden = self.canonical(terms[0])
            if not terms[0].when:
                return self.b.cast(hidden, torch.bool)
            return self.b.call(aten.logical_not.default, hidden)
        mask: Node | None = None
        for term in terms:
            mask = self._join(mask, term)
        return mask

    def _join(self, mask: Node | None, term: Term) -> Node:
        b, node = self.b, self.canonical(term)
        if term.fill is None:
            if not val(node).is_floating_point():
                node = b.cast(node, val(self.q4).dtype)
            if term.scale != 1.0:
                node = b.call(aten.mul.Tensor, node, term.scale)
            return node if mask is None else b.call(aten.add.Tensor, mask, node)
        fill = _finite(term.fill, val(self.q4).dtype)
        node = b.cast(node, torch.bool)
        if mask is None:
            pair = (fill, 0.0) if term.when else (0.0, fill)
            return b.call(aten.where.Scalar, node, *pair)
        if term.when:
            return b.call(aten.where.ScalarSelf, node, fill, mask)
        return b.call(aten.where.ScalarOther, node, mask, fill)

    def canonical(self, term: Term) -> Node:
        """The node of `term`, made for the layout at its depth, as a 4-D mask."""
        axes, sizes, viewed = self._frame(term.depth)
        node = _unexpanded(term.node)
        if val(node).ndim > len(axes):
            raise Stop(node, "a mask has more axes than the logits")
        for _ in range(len(axes) - val(node).ndim):
            node = self.b.unsqueeze(node, 0)
        match = self.match
        tokens = (match.t_label, match.s_label)
        batch = tuple(x for x in axes if x not in tokens) if viewed else match.batch
        order = [axes.index(x) for x in (*batch, *tokens)]
        have = [sizes[i] for i in order]
        return self._fold(self.b.permute(node, order), have)

    def _frame(self, depth: int) -> tuple[Axes, tuple[Key, ...], bool]:
        """Labels and sizes of the logits after `depth` layout steps, and whether one was a view."""
        axes, viewed = self.match.first.out_axes, False
        sizes = shape(self.match.first.node)
        for i, step in enumerate(self.match.steps[:depth]):
            sizes = shape(step.node)
            if step.order is not None:
                axes = tuple(axes[j] for j in step.order)
            else:
                viewed = True
                axes = (*(f"view{i}.{j}" for j in range(len(sizes) - 2)), *axes[-2:])
        return axes, sizes, viewed

    def _fold(self, node: Node, frame: list[Key]) -> Node:
        """[batch..., T, S] -> [B, H, T, S], where axes of size 1 stay as they are if they can."""
        b, rank = self.b, len(frame) - 2
        have = shape(node)
        heads = int(shape(self.q4)[1])
        if rank == 2 and tuple(frame[:2]) == shape(self.q4)[:2]:
            return node
        tail = [b.size(node, rank), b.size(node, rank + 1)]
        if all(s == 1 for s in have[:rank]):
            return b.reshape(node, [1, 1, *tail])
        if rank == 1 and heads == 1:
            return b.unsqueeze(node, 1)
        named = [i for i, s in enumerate(frame[:rank]) if not isinstance(s, int)]
        if have[:rank] == tuple(frame[:rank]):
            return b.reshape(node, [-1, heads, *tail])
        if named and any(have[i] == 1 for i in named):
            node = self._expand_named(node, frame, named)
        else:
            full = [frame[i] if i not in named else -1 for i in range(rank)]
            node = b.call(aten.expand.default, node, [*full, -1, -1])
        return b.reshape(node, [-1, heads, *tail])

    def _expand_named(self, node: Node, frame: list[Key], named: list[int]) -> Node:
        """Expand with one dynamic batch axis: its size is what remains of B * H."""
        if len(named) > 1:
            raise Stop(node, "a mask is broadcast over more than one dynamic batch axis")
        rest = math.prod(int(s) for i, s in enumerate(frame[:-2]) if i not in named)
        rows = self.b.call(operator.mul, self.b.size(self.q4, 0), int(shape(self.q4)[1]))
        count = self.b.call(operator.floordiv, rows, rest)
        full = [count if i in named else frame[i] for i in range(len(frame) - 2)]
        return self.b.call(aten.expand.default, node, [*full, -1, -1])


def _unexpanded(node: Node) -> Node:
    """`node` before an expansion: a mask broadcasts by itself."""
    inner = source(node)
    while op_of(node) == "expand" and inner is not None and has_tensor(inner):
        node, inner = inner, source(inner)
    return node


def _finite(fill: float, dtype: torch.dtype) -> float:
    """`fill` within the range of `dtype`; -inf stays."""
    return fill if math.isinf(fill) else max(fill, float(torch.finfo(dtype).min))
