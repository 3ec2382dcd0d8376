"""What the matchers hand over: a described hand-written attention, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from passes.contraction import Axes, Contraction


class Stop(Exception):
    """The match ends here: `node` and a sentence a user can act on."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


@dataclass(frozen=True)
class Step:
    """A layout change of the logits: `order` (output axis <- input axis), or a view to `sizes`."""

    order: tuple[int, ...] | None
    node: Node


@dataclass(frozen=True)
class Term:
    """A change of the logits: ``x + scale * node``, or `fill` where `node` is `when`.

    `depth` counts the layout steps before it.
    """

    node: Node
    depth: int
    scale: float = 1.0
    fill: float | None = None
    when: bool = True


@dataclass
class SoftmaxMatch:
    """softmax(scale * q k^T + terms) v, with the layout steps between.

    `probs` is the operand of `second` that holds the probabilities, its axes are `probs_axes`
    in the labels of `first`; `inner` are all nodes from q k^T to `probs`.
    """

    softmax: Node
    first: Contraction
    second: Contraction
    query_first: bool
    scale: float
    terms: list[Term]
    steps: list[Step]
    probs: Node
    probs_axes: Axes
    dropout: float
    inner: list[Node]

    @property
    def q(self) -> tuple[Node, Axes]:
        """The query operand and its labels."""
        c = self.first
        return (c.a, c.a_axes) if self.query_first else (c.b, c.b_axes)

    @property
    def k(self) -> tuple[Node, Axes]:
        """The key operand and its labels."""
        c = self.first
        return (c.b, c.b_axes) if self.query_first else (c.a, c.a_axes)

    @property
    def t_label(self) -> str:
        """The label of the query tokens."""
        return self.first.a_only if self.query_first else self.first.b_only

    @property
    def s_label(self) -> str:
        """The label of the key tokens."""
        return self.first.b_only if self.query_first else self.first.a_only

    @property
    def batch(self) -> Axes:
        """The batch labels of q k^T, in order."""
        tokens = (self.t_label, self.s_label)
        return tuple(x for x in self.first.out_axes if x not in tokens)

    @property
    def v(self) -> tuple[Node, Axes]:
        """The value operand and its labels, in those of `first`; its own axis is "E"."""
        second = self.second
        probs_first = second.a is self.probs
        node, axes = (second.b, second.b_axes) if probs_first else (second.a, second.a_axes)
        return node, self.relabel(axes)

    def relabel(self, axes: Axes) -> Axes:
        """Labels of `second` in those of `first`; the features of v are "E"."""
        second = self.second
        own = second.a_axes if second.a is self.probs else second.b_axes
        names = dict(zip(own, self.probs_axes, strict=True))
        return tuple(names.get(x, "E") for x in axes)
