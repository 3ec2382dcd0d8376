"""Hand-written attention: from a softmax up to q k^T and down to the product with v."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from passes.contraction import Contraction, as_contraction
from passes.evaluate import Evaluator, is_parameter, needed
from passes.match import SoftmaxMatch, Step, Stop, Term
from passes.ops import (
    COPIES,
    HIDDEN,
    SHAPE_ONLY,
    arg,
    has_tensor,
    op_of,
    permutation,
    shape,
    source,
    submodule_of,
    val,
)
from passes.roles import FEATURE, MIXED, OTHER, axis_role, is_trained

_FARTHEST = 40
_FIRST = frozenset({"view", "unsqueeze", "squeeze", "masked_fill", "sub", "div", "clamp"})
# Followed only to say that the logits go through them.
_REFUSED = frozenset({"tanh", "relu", "sigmoid", "softplus", "pow", "abs", "exp", "gelu"})


def match_softmax(module: GraphModule, softmax: Node) -> SoftmaxMatch:
    """The attention around `softmax`; `Stop` says where and why there is none."""
    logits = source(softmax)
    if logits is None or not has_tensor(logits):
        raise Stop(softmax, "softmax of something that is not a tensor")
    path = _path_up(logits)
    if path is None:
        raise Stop(softmax, "softmax of something that is not a product q k^T")
    first = as_contraction(path[0])
    assert first is not None
    walk = _Walk(module, first)
    for before, node in itertools.pairwise(path):
        walk.take(before, node)
    walk.inner = [*path, softmax]
    return _finish(walk, softmax)


def _path_up(node: Node, far: int = 0) -> list[Node] | None:
    """Nodes from the product q k^T to `node`, or None."""
    if as_contraction(node) is not None:
        return [node]
    if far > _FARTHEST:
        return None
    for inner in _carriers(node):
        path = _path_up(inner, far + 1)
        if path is not None:
            return [*path, node]
    return None


def _carriers(node: Node) -> list[Node]:
    """Arguments through which logits may come."""
    op = op_of(node)
    if op in COPIES or permutation(node) is not None:
        found: list[Any] = [source(node)]
    elif op in _FIRST or op in _REFUSED:
        found = [source(node)]
    elif op in ("add", "mul", "maximum", "max"):
        found = list(node.args[:2])
    elif op == "where":
        found = list(node.args[1:3])
    else:
        found = []
    return [n for n in found if has_tensor(n)]


def constant(module: GraphModule, value: Any) -> float | None:
    """`value` as a number, if it is one or a constant tensor with one element."""
    if isinstance(value, int | float):
        return float(value)
    if not has_tensor(value) or val(value).numel() != 1:
        return None
    steps = needed([value], set())
    if any(n.op in ("placeholder", "call_module") or is_parameter(module, n) for n in steps):
        return None
    return float(Evaluator(module, {})(value))


@dataclass
class _Walk:
    """State of the logits along the way from q k^T to the softmax."""

    module: GraphModule
    first: Contraction
    scale: float = 1.0
    terms: list[Term] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    axes: tuple[str, ...] = ()
    inner: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.axes = self.first.out_axes
        self.scale = self.first.scale
        if self.first.addend is not None:
            self.terms.append(Term(self.first.addend, 0, self.first.addend_scale))

    def take(self, before: Node, node: Node) -> None:
        """Follow one node."""
        op = op_of(node)
        if op in COPIES:
            return
        if self.layout(before, node):
            return
        other = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
        if op in ("mul", "div"):
            self._rescale(node, op, node.args[0] if other is before else other)
        elif op in ("add", "sub"):
            self._add(node, node.args[0] if other is before else other, op)
        elif op == "masked_fill":
            cond, value = arg(node, 1, "mask"), arg(node, 2, "value")
            self._fill(node, cond, value, True)
        elif op == "where":
            kept_first = node.args[1] is before
            self._fill(node, node.args[0], node.args[2 if kept_first else 1], not kept_first)
        elif op in ("maximum", "max", "clamp") and self._floor(node, before):
            return
        else:
            raise Stop(node, f"the logits go through {op!r}, which is not part of an attention")

    def layout(self, before: Node, node: Node) -> bool:
        """Follow a transpose or view; False for any other node."""
        order = permutation(node)
        if order is not None:
            self.axes = tuple(self.axes[i] for i in order)
            self.steps.append(Step(order, node))
            return True
        if op_of(node) not in ("view", "unsqueeze", "squeeze"):
            return False
        have, want = shape(before), shape(node)
        if have == want:
            return True
        tokens = (self.first.a_only, self.first.b_only)
        if set(self.axes[-2:]) != set(tokens) or have[-2:] != want[-2:] or len(want) < 2:
            raise Stop(node, "a view mixes the token axes of the logits with others")
        depth = len(self.steps)
        self.axes = (*(f"view{depth}.{i}" for i in range(len(want) - 2)), *self.axes[-2:])
        self.steps.append(Step(None, node))
        return True

    def number(self, value: Any) -> float | None:
        """`value` as a number, see `constant`."""
        return constant(self.module, value)

    def _rescale(self, node: Node, op: str, by: Any) -> None:
        factor = self.number(by)
        if factor is None or (op == "div" and (node.args[0] is by or factor == 0)):
            raise Stop(node, "the logits are scaled by something that is not a constant number")
        factor = 1 / factor if op == "div" else factor
        self.scale *= factor
        self.terms = [
            Term(t.node, t.depth, t.scale * factor, None if t.fill is None else t.fill * factor,
                 t.when)
            for t in self.terms
        ]  # fmt: skip

    def _add(self, node: Node, term: Any, op: str) -> None:
        alpha = node.kwargs.get("alpha", 1)
        if self.number(term) is not None and not has_tensor(term):
            return  # softmax does not see a constant
        if not has_tensor(term) or not isinstance(alpha, int | float):
            raise Stop(node, "something that is not a tensor is added to the logits")
        sign = -1.0 if op == "sub" else 1.0
        self.terms.append(Term(term, len(self.steps), sign * float(alpha)))

    def _fill(self, node: Node, cond: Any, value: Any, when: bool) -> None:
        number = self.number(value)
        if number is None or not has_tensor(cond):
            raise Stop(node, "hidden logits are replaced by something that is not a constant")
        if number > HIDDEN:
            raise Stop(node, f"hidden logits are set to {number:g}, which does not hide a key")
        self.terms.append(Term(cond, len(self.steps), 1.0, number, when))

    def _floor(self, node: Node, before: Node) -> bool:
        """Whether `node` only cuts off logits far below any that can be seen."""
        if op_of(node) == "clamp":
            low, high = arg(node, 1, "min"), arg(node, 2, "max")
            return high is None and isinstance(low, int | float) and low <= HIDDEN
        other = [a for a in node.args[:2] if a is not before]
        number = self.number(other[0]) if other else None
        return number is not None and number <= HIDDEN


def _finish(walk: _Walk, softmax: Node) -> SoftmaxMatch:
    first = walk.first
    dim = _softmax_axis(softmax)
    label = walk.axes[dim]
    if label not in (first.a_only, first.b_only):
        raise Stop(softmax, f"softmax over axis {dim}, which is not an axis of tokens")
    query_first = label == first.b_only
    second, probs, dropout = _down(walk, softmax)
    _check_product(walk, second, probs, label)
    match = SoftmaxMatch(
        softmax, first, second, query_first, walk.scale, walk.terms, walk.steps,
        probs, walk.axes, dropout, walk.inner,
    )  # fmt: skip
    _check_roles(match)
    _check_users(match)
    return match


def _softmax_axis(softmax: Node) -> int:
    module = submodule_of(softmax)
    dim = module.dim if module is not None else arg(softmax, 1, "dim", -1)
    return int(dim if isinstance(dim, int) else -1) % val(softmax).ndim


def real_users(node: Node) -> list[Node]:
    """Users that read values, not only sizes."""
    return [u for u in node.users if op_of(u) not in SHAPE_ONLY and not _sizes_only(u, node)]


def _sizes_only(user: Node, node: Node) -> bool:
    """Whether `user` is x.expand_as(node), x.type_as(node) and the like."""
    return op_of(user) in ("expand", "view", "to") and source(user) is not node


def _down(walk: _Walk, softmax: Node) -> tuple[Contraction, Node, float]:
    """The product with v, the node that enters it, and the dropout on the way."""
    node, dropout = softmax, 0.0
    for _ in range(_FARTHEST):
        users = real_users(node)
        if len(users) != 1:
            names = ", ".join(_name(u) for u in users)
            why = f"the probabilities are used elsewhere: {names}" if users else "never used"
            raise Stop(node, why)
        user = users[0]
        found = as_contraction(user)
        if found is not None:
            return found, node, dropout
        if op_of(user) == "dropout":
            dropout = max(dropout, dropout_rate(user))
        elif op_of(user) not in COPIES and not walk.layout(node, user):
            what = "an output of the model" if user.op == "output" else repr(op_of(user))
            raise Stop(user, f"the probabilities go to {what}, not to a product with v")
        walk.inner.append(user)
        node = user
    raise Stop(node, "no product with v was found after the softmax")


def _name(node: Node) -> str:
    return "an output of the model" if node.op == "output" else node.name


def dropout_rate(node: Node) -> float:
    """The rate at which a dropout node drops: 0 if it is not training."""
    module = submodule_of(node)
    if module is not None:
        return float(str(module.p)) if module.training else 0.0
    rate, train = arg(node, 1, "p", 0.5), arg(node, 2, "train", None)
    train = node.kwargs.get("training", True) if train is None else train
    return float(rate) if train and isinstance(rate, int | float) else 0.0


def _check_product(walk: _Walk, second: Contraction, spot: Node, label: str) -> None:
    """The product with v must sum over the keys, and keep the queries."""
    if second.a is second.b:
        raise Stop(second.node, "the probabilities are multiplied with themselves")
    axes = second.a_axes if second.a is spot else second.b_axes
    padded = walk.axes
    if len(axes) != len(padded):
        raise Stop(second.node, "the product with v broadcasts the probabilities")
    if padded[axes.index(second.summed)] != label:
        raise Stop(
            walk.inner[-1],
            "softmax over the wrong axis: the product with v sums over another one",
        )


def _check_roles(match: SoftmaxMatch) -> None:
    """q and k must be multiplied along their features."""
    for name, (node, axes) in (("q", match.q), ("k", match.k)):
        if is_trained(node):
            raise Stop(node, f"{name} is a trained parameter, not an activation")
        role = axis_role(node, axes.index(match.first.summed))
        if role == OTHER:
            raise Stop(match.first.node, f"{name} is not transposed: q k sums over its tokens")
        if role == MIXED:
            raise Stop(match.first.node, f"{name} is reshaped across its axes, not transposed")
        assert role in (FEATURE, "unknown")


def _check_users(match: SoftmaxMatch) -> None:
    before = [n for n in match.inner if n is not match.softmax]
    for node in before:
        users = real_users(node)
        if len(users) > 1:
            names = ", ".join(_name(u) for u in users if u not in match.inner)
            raise Stop(node, f"the logits or probabilities are used elsewhere: {names}")
