"""Every product of two tensors as a labelled contraction: matmul, bmm, baddbmm, einsum, @."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch.fx import Node

from passes.ops import arg, has_tensor, op_of, val

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Contraction:
    """``out[out_axes] = scale * sum a[a_axes] * b[b_axes] + addend_scale * addend``.

    Axes are labels. A label of size 1 in one operand broadcasts; `summed` is the one label
    that both operands have and the output lacks.
    """

    node: Node
    a: Node
    b: Node
    a_axes: Axes
    b_axes: Axes
    out_axes: Axes
    summed: str
    scale: float = 1.0
    addend: Node | None = None
    addend_scale: float = 1.0

    @property
    def a_only(self) -> str:
        """The output label that only `a` has (the last one, where groups of heads add another)."""
        return [x for x in self.out_axes if x not in self.b_axes][-1]

    @property
    def b_only(self) -> str:
        """The output label that only `b` has."""
        return [x for x in self.out_axes if x not in self.a_axes][-1]


def as_contraction(node: Node) -> Contraction | None:
    """`node` as a contraction with one free axis on each side, else None.

    Batch labels that only one operand has (a broadcast matmul) are shared labels here.
    """
    reader = _READERS.get(op_of(node))
    return reader(node) if reader is not None else None


def _operands(node: Node) -> tuple[Any, Any]:
    first = arg(node, 0, "input", node.kwargs.get("self"))
    return first, arg(node, 1, "other", node.kwargs.get("mat2"))


def _matmul(node: Node) -> Contraction | None:
    a, b = _operands(node)
    if not (has_tensor(a) and has_tensor(b)) or val(a).ndim < 2 or val(b).ndim < 2:
        return None
    return _batched(node, a, b)


def _batched(node: Node, a: Node, b: Node, **more: Any) -> Contraction:
    def axes(x: Node, last: tuple[str, str]) -> Axes:
        n = val(x).ndim - 2
        return (*(f"b{i}" for i in range(n - 1, -1, -1)), *last)

    longest = a if val(a).ndim >= val(b).ndim else b
    out = (*axes(longest, ("m", "n"))[:-2], "m", "n")
    return Contraction(node, a, b, axes(a, ("m", "c")), axes(b, ("c", "n")), out, "c", **more)


def _baddbmm(node: Node) -> Contraction | None:
    addend, a, b = arg(node, 0, "input", node.kwargs.get("self")), *_two(node)
    if not (has_tensor(a) and has_tensor(b)):
        return None
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not isinstance(beta, int | float) or not isinstance(alpha, int | float):
        return None
    return _batched(
        node,
        a,
        b,
        scale=float(alpha),
        addend=addend if beta != 0 and isinstance(addend, Node) else None,
        addend_scale=float(beta),
    )


def _two(node: Node) -> tuple[Any, Any]:
    return arg(node, 1, "batch1"), arg(node, 2, "batch2")


def _einsum(node: Node) -> Contraction | None:
    equation = node.args[0]
    rest = node.args[1:]
    operands = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
    if not isinstance(equation, str) or not isinstance(operands, list | tuple):
        return None
    if len(operands) != 2 or not all(has_tensor(o) for o in operands):
        return None
    a, b = operands
    assert isinstance(a, Node)
    assert isinstance(b, Node)
    read = _equation(equation, val(a).ndim, val(b).ndim)
    if read is None:
        return None
    return _checked(node, a, b, *read)


def _equation(text: str, a_rank: int, b_rank: int) -> tuple[Axes, Axes, Axes] | None:
    left, arrow, right = text.replace(" ", "").partition("->")
    if not arrow or left.count(",") != 1:
        return None
    first, second = left.split(",")
    a, b = _expand(first, a_rank), _expand(second, b_rank)
    dots = max((x for x in (a, b)), key=lambda axes: sum(s.startswith(".") for s in axes))
    out: list[str] = []
    for part in right.replace("...", "."):
        out.extend([s for s in dots if s.startswith(".")] if part == "." else [part])
    return a, b, tuple(out)


def _expand(text: str, rank: int) -> Axes:
    """Letters as labels; an ellipsis becomes labels counted from the right."""
    letters = text.replace("...", ".")
    missing = rank - (len(letters) - letters.count("."))
    out: list[str] = []
    for part in letters:
        out.extend([f".{i}" for i in range(missing - 1, -1, -1)] if part == "." else [part])
    return tuple(out)


def _checked(node: Node, a: Node, b: Node, ia: Axes, ib: Axes, io: Axes) -> Contraction | None:
    if any(len(set(x)) != len(x) for x in (ia, ib, io)):
        return None
    summed = (set(ia) | set(ib)) - set(io)
    if len(summed) != 1 or not summed <= set(ia) & set(ib):
        return None
    only_a, only_b = set(ia) - set(ib), set(ib) - set(ia)
    if len(only_b) == 1 and len(only_a) >= 1:
        return Contraction(node, a, b, ia, ib, io, summed.pop())
    if len(only_a) == 1 and len(only_b) >= 1:
        return Contraction(node, a, b, ia, ib, io, summed.pop())
    return None


_READERS: Final[dict[str, Callable[[Node], Contraction | None]]] = {
    "matmul": _matmul,
    "bmm": _matmul,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
}
