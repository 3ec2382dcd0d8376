"""Changes of the graph around an attention that some forms start from.

`ALL_TOKENS` takes out a spatial reduction (PVT, Segformer): keys and values are then made from
all tokens, by the projections that are there, and what reduced the tokens is dead.
`SHARED` gives the attention its queries as keys, so one projection serves both (EcoFormer keeps
the query's weights); the key's projection is dead.

Everything is found in the graph and proved by running the pieces on random data: the projection's
output must be split into heads and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.builder import Builder
from passes.errors import FormError
from passes.evaluate import Evaluator
from passes.form import Form
from passes.ops import LAYOUT, arg, op_of, sizes, source, val
from passes.site import AttentionSite, Mask

ALL_TOKENS, SHARED = "all tokens", "shared projection"
_LINEAR = frozenset({"linear", "addmm"})
_TO_HEADS = LAYOUT | {"select", "getitem", "split", "chunk", "unbind", "slice", "dropout"}
_REDUCES = frozenset({"conv", "avg_pool2d", "adaptive_avg_pool2d", "max_pool2d", "mean"})
_AROUND = LAYOUT | {"layer_norm", "native_layer_norm", "batch_norm", "gelu", "relu", "silu",
                    "dropout", "getitem", "native_dropout"}  # fmt: skip


@dataclass(frozen=True)
class Head:
    """How a key or value is made: `linear` of its input, columns from `start`, split into heads."""

    linear: Node
    start: int


@dataclass(frozen=True)
class Reduction:
    """A spatial reduction: `tokens` [B, T, C] become what the projections of k and v read."""

    tokens: Node
    key: Head
    value: Head


def reduction(module: GraphModule, node: Node, site: AttentionSite) -> Reduction | None:
    """The spatial reduction before the keys and values of the SDPA `node`, or None."""
    d = site.dims
    if site.mask != Mask() or not isinstance(d.S, int) or not isinstance(d.T, int):
        return None
    if d.S >= d.T:
        return None
    q, k, v = (a for a in node.args[:3] if isinstance(a, Node))
    query = projection(q)
    key, value = _head(module, k, d.G * d.D), _head(module, v, d.G * d.E)
    if query is None or key is None or value is None:
        return None
    tokens, read = _input(query), _input(key.linear)
    if tokens is None or read is None or read is not _input(value.linear):
        return None
    ahead = _unreduced(tokens, read)
    return Reduction(ahead, key, value) if ahead is not None else None


def mark_reduced(module: GraphModule) -> None:
    """Write into the sites of a canonical graph which have reduced keys; those are not cross."""
    for node in module.graph.nodes:
        site = node.meta.get("attention_site")
        if isinstance(site, AttentionSite):
            found = reduction(module, node, site) is not None
            cross = site.cross and not found
            node.meta["attention_site"] = replace(site, reduced=found, cross=cross)


def rewired(site: AttentionSite, changes: tuple[str, ...]) -> AttentionSite:
    """The site as it is after `changes`."""
    if ALL_TOKENS in changes:
        site = replace(site, dims=replace(site.dims, S=site.dims.T), reduced=False)
    return replace(site, shared=True) if SHARED in changes else site


def rewire(module: GraphModule, node: Node, site: AttentionSite, form: Form) -> AttentionSite:
    """Make the changes `form` asks for at the SDPA `node`; returns the site as it is then.

    Raises:
        FormError: the graph does not have what is to be changed.
    """
    changes = form.rewires(site)
    if ALL_TOKENS in changes:
        found = reduction(module, node, site)
        if found is None:
            raise FormError(f"{form.name}: no spatial reduction was found before {site.id}")
        _take_all_tokens(node, site, found)
    if SHARED in changes:
        q, k = node.args[:2]
        assert isinstance(q, Node)
        assert isinstance(k, Node)
        if sizes(q) != sizes(k):
            raise FormError(f"{form.name}: queries {sizes(q)} can not be the keys {sizes(k)} too")
        node.update_arg(1, q)
    return rewired(site, changes)


def restore(module: GraphModule, call: Node, original: Node) -> None:
    """Undo `rewire`: make the call's q, k and v again as `original` (of the traced graph) has them.

    What was left out of the graph is copied from the traced one; parameters keep their values.
    """
    here = {n.name: n for n in module.graph.nodes}

    def again(node: Node) -> Node:
        if node.name not in here:
            for inner in node.all_input_nodes:
                again(inner)
            with module.graph.inserting_before(call):
                here[node.name] = module.graph.node_copy(node, lambda n: here[n.name])
        found: Node = here[node.name]
        return found

    for index, argument in enumerate(original.args[:3]):
        assert isinstance(argument, Node)
        call.update_arg(index, again(argument))


def projection(node: Node) -> Node | None:
    """The linear layer whose output, only moved and scaled, is `node`; None if there is none."""
    at: Node | None = node
    while at is not None and op_of(at) not in _LINEAR:
        if op_of(at) not in _TO_HEADS | {"mul", "div"}:
            return None
        at = source(at)
    return at


def _input(linear: Node) -> Node | None:
    """What the linear layer reads, before views that keep the tokens."""
    place = 1 if op_of(linear) == "addmm" else 0
    found = arg(linear, place, "mat1" if place else "input")
    while isinstance(found, Node) and op_of(found) in ("view", "contiguous"):
        inner = source(found)
        if inner is None or sizes(inner)[-1] != sizes(found)[-1]:
            break
        found = inner
    return found if isinstance(found, Node) else None


def _head(module: GraphModule, node: Node, width: int) -> Head | None:
    """`node` [B, G, S, D] as columns of a linear layer's output split into heads, proved."""
    linear = projection(node)
    if linear is None or len(sizes(linear)) != 3:
        return None
    probe = torch.randn(sizes(linear), dtype=val(linear).dtype)
    try:
        seen = Evaluator(module, {linear: probe})(node)
    except (KeyError, RuntimeError):
        return None
    b, g, s, d = seen.shape
    for start in range(0, probe.shape[-1], width):
        columns = probe[..., start : start + width]
        if columns.shape[-1] == width and torch.equal(
            columns.reshape(b, s, g, d).transpose(1, 2), seen
        ):
            return Head(linear, start)
    return None


def _unreduced(tokens: Node, read: Node) -> Node | None:
    """`tokens`, if `read` is made from them by a reduction, norms and layout alone."""
    at: Node | None = read
    reduces = False
    while at is not None and at is not tokens:
        op = op_of(at)
        if op not in _AROUND | _REDUCES:
            return None
        reduces |= op in _REDUCES
        at = source(at)
    return at if reduces else None


def _take_all_tokens(node: Node, site: AttentionSite, found: Reduction) -> None:
    d = site.dims
    made: dict[Node, Node] = {}

    def head(part: Head, groups: int, width: int) -> Node:
        build = Builder(node)
        if part.linear not in made:
            made[part.linear] = _again(build, part.linear, found.tokens)
        out = made[part.linear]
        if sizes(out)[-1] != groups * width:
            stop = part.start + groups * width
            out = build.call(torch.ops.aten.slice.Tensor, out, -1, part.start, stop)
        split = build.reshape(out, [build.size(out, 0), sizes(out)[1], groups, width])
        return build.permute(split, (0, 2, 1, 3))

    node.update_arg(1, head(found.key, d.G, d.D))
    node.update_arg(2, head(found.value, d.G, d.E))


def _again(build: Builder, linear: Node, tokens: Node) -> Node:
    """The same linear layer on `tokens`."""
    if op_of(linear) == "linear":
        rest: list[Any] = list(linear.args[1:])
        made = build.call(linear.target, tokens, *rest, **linear.kwargs)
    else:
        _, count, width = sizes(tokens)
        flat = build.reshape(tokens, [-1, width])
        out = build.call(linear.target, linear.args[0], flat, *linear.args[2:], **linear.kwargs)
        made = build.reshape(out, [build.size(tokens, 0), count, sizes(out)[-1]])
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in linear.meta:
            made.meta[key] = linear.meta[key]
    return made
