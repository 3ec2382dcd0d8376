"""From a match to 4-D operands, one mask and one SDPA node in the graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from passes.builder import Builder, aten
from passes.contraction import Axes
from passes.match import SoftmaxMatch, Stop
from passes.ops import COPIES, op_of, permutation, shape, source, val
from passes.rebuild_mask import MaskFrames

Number = Callable[[Any], float | None]
_LAYOUT = COPIES | {"view", "unsqueeze", "squeeze"}


@dataclass(frozen=True)
class Rebuilt:
    """The SDPA node and what stands for the product with v."""

    sdpa: Node
    out: Node


def rebuild(match: SoftmaxMatch, builder: Builder, number: Number) -> Rebuilt:
    """Insert the canonical form of `match` before the builder's anchor."""
    scale = match.scale
    (q, q_axes), (k, k_axes), (v, v_axes) = match.q, match.k, match.v
    q, q_factor = strip_scale(builder, q, number)
    k, k_factor = strip_scale(builder, k, number)
    scale *= q_factor * k_factor
    batch, summed = match.batch, match.first.summed
    q_n = to_axes(builder, q, q_axes, (*batch, match.t_label, summed))
    k_n = to_axes(builder, k, k_axes, (*batch, match.s_label, summed))
    fold = Fold.of(q_n, k_n, len(batch))
    q4, k4 = fold.query(builder, q_n), fold.key(builder, k_n)
    if not isinstance(shape(q4)[1], int):
        raise Stop(match.softmax, "the number of heads is not constant")
    v4 = _value(match, builder, fold, v, v_axes, int(shape(q4)[1]))
    q4, k4, v4 = settle(builder, q4, k4, v4)
    frames = MaskFrames(match, builder, q4, fold.heads)
    mask = frames.assemble()
    sdpa = call_sdpa(builder, (q4, k4, v4), mask, match.dropout, False, scale)
    return Rebuilt(sdpa, _output(match, builder, sdpa))


def call_sdpa(
    builder: Builder,
    qkv: tuple[Node, Node, Node],
    mask: Node | None,
    dropout: float,
    causal: bool,
    scale: float,
) -> Node:
    """The canonical node."""
    q, k, v = qkv
    q, k = builder.cast(q, val(v).dtype), builder.cast(k, val(v).dtype)
    if mask is not None and val(mask).dtype != torch.bool:
        mask = builder.cast(mask, val(q).dtype)
    return builder.call(
        aten.scaled_dot_product_attention.default,
        *(q, k, v, mask, dropout, causal),
        scale=scale,
        enable_gqa=shape(q)[1] != shape(k)[1],
    )


def to_axes(builder: Builder, node: Node, axes: Axes, wanted: Axes) -> Node:
    """`node` with its axes in the order `wanted`; a missing one becomes an axis of size 1."""
    order = [axes.index(x) for x in wanted if x in axes]
    node = builder.permute(node, order)
    for i, label in enumerate(wanted):
        if label not in axes:
            node = builder.unsqueeze(node, i)
    return node


def strip_scale(builder: Builder, node: Node, number: Number) -> tuple[Node, float]:
    """`node` without a constant factor that stands behind layout changes only, and the factor."""
    chain: list[Node] = []
    at = node
    while op_of(at) in _LAYOUT or permutation(at) is not None:
        inner = source(at)
        if inner is None:
            return node, 1.0
        chain.append(at)
        at = inner
    op = op_of(at)
    if op not in ("mul", "div") or len(at.args) < 2:
        return node, 1.0
    x, by = at.args[:2]
    if op == "mul" and not isinstance(x, Node):
        x, by = by, x
    factor = number(by)
    if factor is None or factor == 0 or not isinstance(x, Node):
        return node, 1.0
    if shape(x) != shape(at) or val(x).dtype != val(at).dtype:
        return node, 1.0
    for step in reversed(chain):
        x = builder.clone(step, x)
    return x, 1 / factor if op == "div" else factor


@dataclass(frozen=True)
class Fold:
    """How the batch axes of q k^T become [B, H]: `rank` of them, in groups if `grouped`."""

    rank: int
    heads: int | None
    grouped: bool

    @classmethod
    def of(cls, q: Node, k: Node, rank: int) -> Fold:
        """Read off q [batch..., T, D] and k [batch..., S, D]."""
        grouped = rank == 3 and shape(k)[2] == 1 and shape(q)[2] != 1
        return cls(rank, head_count(q) if rank == 1 else None, grouped)

    def query(self, b: Builder, x: Node) -> Node:
        """[batch..., T, D] -> [B, H, T, D]."""
        return self._fold(b, x, grouped=False)

    def key(self, b: Builder, x: Node) -> Node:
        """[batch..., S, D] -> [B, G, S, D]."""
        return self._fold(b, x, grouped=self.grouped)

    def _fold(self, b: Builder, x: Node, *, grouped: bool) -> Node:
        if self.rank == 2:
            return x
        tail = [b.size(x, self.rank), b.size(x, self.rank + 1)]
        if self.rank == 0:
            return b.unsqueeze(b.unsqueeze(x, 0), 0)
        if self.rank == 1:
            if self.heads is None or shape(x)[0] == 1:
                return b.unsqueeze(x, 1)
            return b.reshape(x, [-1, self.heads, *tail])
        sizes = shape(x)
        if self.grouped and not grouped:
            return b.reshape(x, [-1, _product(x, sizes[1:3]), *tail])
        return b.reshape(x, [-1, _product(x, sizes[1:2] if grouped else sizes[2:3]), *tail])


def _product(node: Node, sizes: tuple[int | str, ...]) -> int:
    if not all(isinstance(s, int) for s in sizes):
        raise Stop(node, "the number of heads is not constant")
    return math.prod(int(s) for s in sizes)


def head_count(node: Node) -> int | None:
    """Heads folded into axis 0 of [B * H, T, D], if it can be seen how they came there."""
    rows, tokens, width = shape(node)
    found: int | None = None
    at: Node | None = node
    while at is not None and (op_of(at) in _LAYOUT or permutation(at) is not None):
        at = source(at)
        sizes = shape(at) if at is not None else ()
        if len(sizes) == 4 and sizes[3] == width:
            other = sizes[1] if sizes[2] == tokens else sizes[2]
            return other if isinstance(other, int) and other > 1 else None
        last = sizes[-1] if sizes else 0
        if isinstance(last, int) and isinstance(width, int) and last > width and not last % width:
            found = last // width
    if found is None or (isinstance(rows, int) and rows % found):
        return None
    return found


def _value(match: SoftmaxMatch, b: Builder, fold: Fold, v: Node, axes: Axes, heads: int) -> Node:
    """v as [B, G, S, E]."""
    frame = tuple(x for x in match.probs_axes if x not in (match.t_label, match.s_label))
    if set(frame) == set(match.batch):
        return fold.key(b, to_axes(b, v, axes, (*match.batch, match.s_label, "E")))
    x = to_axes(b, v, axes, (*frame, match.s_label, "E"))
    n = len(frame)
    have = [shape(match.probs)[match.probs_axes.index(f)] for f in frame]
    if list(shape(x)[:n]) != have:
        raise Stop(match.second.node, "v is broadcast over a view of the probabilities")
    return b.reshape(x, [-1, heads, b.size(x, n), b.size(x, n + 1)])


def settle(b: Builder, q: Node, k: Node, v: Node) -> tuple[Node, Node, Node]:
    """Look through repeated key/value heads, and give all the same batch size."""
    k0, v0 = ungroup(b, k), ungroup(b, v)
    if k0 is not None and v0 is not None and shape(k0)[1] == shape(v0)[1]:
        k, v = k0, v0
    heads = shape(q)[1]
    if shape(k)[1] != shape(v)[1]:
        k, v = _heads(b, k, heads), _heads(b, v, heads)
    if heads == 1 and shape(k)[1] != 1:
        q = _heads(b, q, shape(k)[1])
    largest = next((x for x in (q, k, v) if shape(x)[0] != 1), q)
    return _batch(b, q, largest), _batch(b, k, largest), _batch(b, v, largest)


def _heads(b: Builder, node: Node, heads: int | str) -> Node:
    return node if shape(node)[1] == heads else b.call(
        aten.expand.default, node, [-1, heads, -1, -1]
    )  # fmt: skip


def _batch(b: Builder, node: Node, like: Node) -> Node:
    if shape(node)[0] == shape(like)[0]:
        return node
    return b.call(aten.expand.default, node, [b.size(like, 0), -1, -1, -1])


def ungroup(b: Builder, node: Node) -> Node | None:
    """[B, G, S, D] behind [B, G * R, S, D] made by repeating every head R times, else None."""
    node = _uncopied(node)
    inner = source(node)
    if inner is None:
        return None
    if op_of(node) == "repeat_interleave":
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
        repeats = node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
        return inner if dim in (1, -3) and isinstance(repeats, int) else None
    return _unexpanded(b, node, _uncopied(inner)) if op_of(node) == "view" else None


def _uncopied(node: Node) -> Node:
    """`node` before copies that keep its dtype."""
    inner = source(node)
    while op_of(node) in COPIES and inner is not None and val(inner).dtype == val(node).dtype:
        node, inner = inner, source(inner)
    return node


def _unexpanded(b: Builder, node: Node, inner: Node) -> Node | None:
    """Behind the view `node` of an expanded [B, G, R, S, D] `inner`."""
    small = source(inner)
    if op_of(inner) not in ("expand", "repeat") or small is None:
        return None
    have, want = shape(small), shape(inner)
    if len(want) != 5 or len(have) != 5 or have[2] != 1:
        return None
    if have[:2] + have[3:] != want[:2] + want[3:] or shape(node)[2:] != want[3:]:
        return None
    before = source(small)
    while op_of(small) == "slice" and before is not None and shape(before) == shape(small):
        small, before = before, source(before)
    if before is not None and shape(before) == have[:2] + have[3:] and op_of(small) == "unsqueeze":
        return before
    return b.call(aten.squeeze.dim, small, 2)


def _output(match: SoftmaxMatch, b: Builder, sdpa: Node) -> Node:
    """[B, H, T, E] -> the axes and dtype of the product with v."""
    second = match.second
    wanted = match.relabel(second.out_axes)
    frame = tuple(x for x in match.probs_axes if x not in (match.t_label, match.s_label))
    if set(frame) == set(match.batch):
        frame = match.batch
    own = shape(second.node)
    sizes: list[Any] = [own[wanted.index(f)] for f in frame]
    named = [i for i, s in enumerate(sizes) if not isinstance(s, int)]
    if len(frame) != 2:
        if len(named) > 1:
            raise Stop(second.node, "more than one batch axis is dynamic")
        sizes = [-1 if i in named else s for i, s in enumerate(sizes)]
        out = b.reshape(sdpa, [*sizes, b.size(sdpa, 2), b.size(sdpa, 3)])
    else:
        out = sdpa
    have = (*frame, match.t_label, "E")
    out = b.permute(out, [have.index(x) for x in wanted])
    return b.cast(out, val(second.node).dtype)
