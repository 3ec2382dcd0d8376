"""Where the axes and the values of a query or key come from."""

from __future__ import annotations

import math
from typing import Final

from torch.fx import Node

from passes.ops import COPIES, PERMUTES, arg, has_tensor, op_of, permutation, sizes, source

FEATURE, OTHER, MIXED, UNKNOWN = "feature", "other", "mixed", "unknown"
_POINTWISE: Final = frozenset(
    {"add", "sub", "mul", "div", "neg", "dropout", "masked_fill", "relu", "gelu", "silu", "tanh"}
    | {"layer_norm", "rms_norm", "group_norm", "batch_norm", "cat", "slice", "roll", "normalize"}
    | {"expand", "repeat_interleave", "repeat", "split", "chunk", "constant_pad_nd", "pad"}
    | {"split_with_sizes", "tensor_split", "sigmoid", "clamp", "elu", "pow"}
)
_PROJECTIONS: Final = frozenset({"linear", "addmm", "matmul", "bmm", "mm", "embedding", "einsum"})
_DEEP: Final = frozenset({"view", "unsqueeze", "squeeze", "getitem", "select", "unbind"})


def axis_role(node: Node, axis: int) -> str:
    """What axis `axis` of `node` means: "feature", "other" (tokens, batch), "mixed", "unknown".

    Axes are followed back through views, transposes and pointwise operations to a projection
    or an input, whose last axis (of a convolution: axis 1) holds the features.
    """
    for _ in range(64):
        op, inner = op_of(node), source(node)
        rank = len(sizes(node))
        axis %= rank
        if op in ("", "linear", "addmm", "matmul", "bmm", "mm", "embedding"):
            return FEATURE if axis == rank - 1 else OTHER
        if op == "conv":
            return FEATURE if axis == 1 else OTHER
        step = _step(node, op, inner, axis)
        if isinstance(step, str):
            return step
        node, axis = step
    return UNKNOWN


def _step(node: Node, op: str, inner: Node | None, axis: int) -> tuple[Node, int] | str:
    """One step back: the node and axis that hold this axis, or the answer."""
    if op in PERMUTES and inner is not None:
        perm = permutation(node)
        return (inner, perm[axis]) if perm is not None else UNKNOWN
    if op in COPIES and inner is not None:
        return inner, axis
    if op in ("view", "unsqueeze", "squeeze") and inner is not None:
        return _through_view(inner, sizes(node), axis)
    if op == "getitem" and inner is not None:
        return _through_parts(node, inner, axis)
    if op == "select" and inner is not None and has_tensor(inner):
        dim = arg(node, 1, "dim") % len(sizes(inner))
        return inner, axis + (axis >= dim)
    if op in _POINTWISE:
        return _through_pointwise(node, axis)
    return UNKNOWN


def _through_parts(node: Node, parts: Node, axis: int) -> tuple[Node, int] | str:
    """Through ``split(x)[i]``, ``unbind(x)[i]`` or ``x[i]``."""
    if has_tensor(parts):
        # Indexing of a tensor: a leading integer removes that axis.
        return (parts, axis + 1) if isinstance(node.args[1], int) else UNKNOWN
    inner = source(parts)
    if inner is None or not has_tensor(inner):
        return UNKNOWN
    if op_of(parts) == "unbind":
        dim = arg(parts, 1, "dim", 0) % len(sizes(inner))
        return inner, axis + (axis >= dim)
    return (inner, axis) if op_of(parts) in _POINTWISE else UNKNOWN


def _through_pointwise(node: Node, axis: int) -> tuple[Node, int] | str:
    rank = len(sizes(node))
    inputs = [n for n in node.all_input_nodes if has_tensor(n)]
    if not inputs:
        return UNKNOWN
    best = max(inputs, key=lambda n: (len(sizes(n)), math.prod(sizes(n))))
    back = axis - rank + len(sizes(best))
    return (best, back) if back >= 0 else UNKNOWN


def _through_view(inner: Node, out: tuple[int, ...], axis: int) -> tuple[Node, int] | str:
    """The input axes that axis `axis` of a view covers: one, or the answer for several."""
    low = math.prod(out[axis + 1 :])
    high = low * out[axis]
    if low == high:
        return UNKNOWN
    have = sizes(inner)
    covered = [
        i
        for i, size in enumerate(have)
        if size > 1 and math.prod(have[i + 1 :]) < high and math.prod(have[i:]) > low
    ]
    if len(covered) == 1:
        return inner, covered[0]
    roles = {axis_role(inner, i) for i in covered}
    return roles.pop() if len(roles) == 1 else MIXED


def sources(node: Node) -> set[Node]:
    """The activations `node` is made from: back through one projection and what is around it."""
    found: set[Node] = set()
    seen: set[tuple[Node, bool]] = set()
    stack = [(node, False)]
    while stack:
        at, projected = item = stack.pop()
        if item in seen:
            continue
        seen.add(item)
        before = _before(at, projected)
        if before:
            stack.extend((n, projected or op_of(at) in _PROJECTIONS) for n in before)
        elif _from_input(at):
            found.add(at)
    return found


def _from_input(node: Node) -> bool:
    """Whether `node` depends on a model input; parts of a packed weight do not."""
    seen, stack = set(), [node]
    while stack:
        at = stack.pop()
        if at.op == "placeholder":
            return True
        if at not in seen:
            seen.add(at)
            stack.extend(at.all_input_nodes)
    return False


def _before(node: Node, projected: bool) -> list[Node]:
    """The inputs that carry the activation, [] where the walk ends."""
    op = op_of(node)
    inputs = node.all_input_nodes
    if op in PERMUTES | COPIES | _DEEP or op in ("conv", "layer_norm", "dropout", "roll", "pad"):
        return inputs[:1]
    if op == "index":  # some heads of a fused projection; of a table it is a lookup
        return _activations(inputs[:1])
    if op in _PROJECTIONS:
        return [] if projected else _activations(inputs)
    if op in ("add", "sub", "cat"):
        return _activations(inputs)
    if op in _POINTWISE and not projected:
        tensors = [n for n in _activations(inputs) if has_tensor(n) or n.op == "call_function"]
        largest = max((math.prod(sizes(n)) for n in tensors if has_tensor(n)), default=0)
        return [n for n in tensors if not has_tensor(n) or math.prod(sizes(n)) == largest]
    return []


def _activations(nodes: list[Node]) -> list[Node]:
    """Without parameters, buffers and sizes."""
    return [
        n
        for n in nodes
        if n.op != "get_attr" and (has_tensor(n) or isinstance(n.meta.get("val"), list | tuple))
    ]


def is_trained(node: Node) -> bool:
    """Whether `node` is a parameter or a layout change of one, not an activation."""
    at: Node | None = node
    while at is not None and op_of(at) in PERMUTES | COPIES | {"view", "unsqueeze", "expand"}:
        at = source(at)
    return at is not None and at.op == "get_attr"
