"""Fitting all attention blocks at once, each on the original's own activations.

A block is what lies between the activation that q, k and v are projected from and the output
projection's result. Every step runs the blocks of all rewritten sites on what the original had
there and compares their results, so that gradients stay short and well conditioned and the
feed-forward layers are not computed at all. Forms and the projections that belong to one site
alone are trained together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from passes.substitute import Rewritten
from rewriter.fit_loop import Task, shuffled
from rewriter.fit_model import form_names, half, projection_names, room, with_rates
from rewriter.fit_precision import arithmetic
from rewriter.fit_report import Recipe
from rewriter.linears import hidden_nodes, input_projections, output_projection, site_node
from rewriter.taps import Tapped

Batches = Sequence[Mapping[str, Tensor]]
Values = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """One site's block: `run(*values of inputs)` gives what the node `out` had."""

    run: GraphModule
    inputs: tuple[str, ...]
    out: str
    stream: str  # the residual sum behind it, whose size the error is measured by


def blocks(rewritten: Rewritten) -> list[Block]:
    """The blocks of all rewritten sites."""
    streams = dict(zip((s.id for s in rewritten.sites), hidden_nodes(rewritten), strict=True))
    return [_block(rewritten, site, streams[site]) for site in rewritten.plan.rewritten]


def _block(rewritten: Rewritten, site: str, stream: Node) -> Block:
    linear, _ = output_projection(rewritten, site)
    call = site_node(rewritten, site)
    out = call if linear is None else linear.node
    starts = {p.node.args[0] for p in input_projections(rewritten, site)}
    starts |= {a for a in call.args[:3] if isinstance(a, Node) and not _reaches(a, starts)}
    inside = _between(out, starts)
    graph, made, inputs = Graph(), {}, []

    def value_of(node: Node) -> Node:
        if node not in made:
            if node in inside:
                made[node] = graph.node_copy(node, value_of)
            elif node.op == "get_attr":
                made[node] = graph.node_copy(node)
            else:
                inputs.append(node.name)
                made[node] = graph.placeholder(node.name)
        return made[node]

    for node in rewritten.module.graph.nodes:  # in their order, so that no recursion is deep
        if node in inside:
            value_of(node)
    graph.output(made[out])
    return Block(GraphModule(rewritten.module, graph), tuple(inputs), out.name, stream.name)


def _reaches(node: Node, starts: Iterable[Any]) -> bool:
    """Whether one of `starts` is among the ancestors of `node`."""
    wanted, seen, stack = set(starts), set(), [node]
    while stack:
        at = stack.pop()
        if at in wanted:
            return True
        if at not in seen:
            seen.add(at)
            stack.extend(at.all_input_nodes)
    return False


def _between(out: Node, starts: set[Any]) -> set[Node]:
    """The nodes on a way from one of `starts` (not itself) to `out` (itself)."""
    forward: set[Node] = set()
    stack = [u for s in starts for u in s.users]
    while stack:
        node = stack.pop()
        if node not in forward:
            forward.add(node)
            if node is not out:
                stack.extend(node.users)
    inside: set[Node] = set()
    stack = [out]
    while stack:
        node = stack.pop()
        if node in forward and node not in inside:
            inside.add(node)
            stack.extend(n for n in node.all_input_nodes if n not in starts)
    return inside


class Activations:
    """What the original has at the blocks' borders for each batch; kept up to a limit."""

    def __init__(
        self,
        teacher: Rewritten,
        parts: Sequence[Block],
        batches: Batches,
        most: int,
        precision: str = "float32",
    ) -> None:
        self.precision = precision
        names = dict.fromkeys(n for b in parts for n in (*b.inputs, b.out, b.stream))
        nodes = {n.name: n for n in teacher.module.graph.nodes}
        self.names, self.batches, self.most, self.held = list(names), batches, most, 0
        self.model = Tapped(teacher.module, [nodes[n] for n in self.names])
        self.kept: dict[int, Values] = {}
        self.halved: set[str] = set()  # float32 names that are kept as float16

    @torch.no_grad()
    def __call__(self, index: int) -> Values:
        """Value of every border node, by name."""
        if index in self.kept:
            kept = self.kept[index]
            return {n: v.float() if n in self.halved else v for n, v in kept.items()}
        with arithmetic(self.precision, self.model.module):
            _, values = self.model(**self.batches[index])
        made = dict(zip(self.names, values, strict=True))
        if self.held + room(values) > self.most:
            return made
        small = {n: _small(v) for n, v in made.items()}
        self.halved |= {n for n, v in made.items() if _dtype(v) != _dtype(small[n])}
        tensors = [v for v in small.values() if isinstance(v, Tensor)]
        size = sum(v.numel() * v.element_size() for v in tensors)
        if self.held + size <= self.most:
            self.kept[index], self.held = small, self.held + size
        return made


def _small(value: Any) -> Any:
    """float32 activations as float16, which says them to three digits, where they fit."""
    return half(value) if isinstance(value, Tensor) and value.dtype is torch.float32 else value


def _dtype(value: Any) -> torch.dtype | None:
    return value.dtype if isinstance(value, Tensor) else None


def block_task(
    rewritten: Rewritten,
    teacher: Rewritten,
    batches: Batches,
    validation: Batches,
    recipe: Recipe,
    seconds: float,
    seed: int,
) -> Task:
    """The stage over all calibration batches."""
    parts = blocks(rewritten)
    wanted = Activations(teacher, parts, batches, recipe.cache_bytes, recipe.precision)
    checked = Activations(teacher, parts, validation, recipe.cache_bytes // 4)

    def loss(step: int, done: float) -> Tensor:
        index = shuffled(step, len(batches), seed, "blocks")
        values = wanted(index)
        with arithmetic(recipe.precision, rewritten.module):
            return block_loss(parts, values, batches[index])

    params, rates = block_parameters(rewritten, recipe)
    validate = _mean(parts, checked, validation)
    return Task("blocks", "blocks", "", params, rates, loss, validate, seconds, recipe.block_steps)


def _mean(parts: Sequence[Block], values: Activations, batches: Batches) -> Callable[[], float]:
    @torch.no_grad()
    def mean() -> float:
        losses = [float(block_loss(parts, values(i), b)) for i, b in enumerate(batches)]
        return sum(losses) / len(losses)

    return mean


def block_parameters(
    rewritten: Rewritten, recipe: Recipe
) -> tuple[dict[str, nn.Parameter], dict[str, float]]:
    """(forms and the projections of the rewritten sites by name, their learning rates)."""
    rates = dict.fromkeys(form_names(rewritten), recipe.block_form_lr)
    if recipe.train != "forms":
        rates |= dict.fromkeys(projection_names(rewritten), recipe.block_weight_lr)
    return with_rates(rewritten, rates)


def block_loss(parts: Sequence[Block], values: Values, batch: Mapping[str, Tensor]) -> Tensor:
    """Squared error of each block's result by the variance of the stream it is added to."""
    total: Tensor | float = 0.0
    for part in parts:
        got = part.run(*(values[n] for n in part.inputs))
        keep = _visible(got, batch)
        stream, wanted = values[part.stream].float(), values[part.out].float()
        wrong = ((got.float() - wanted).square() * keep).sum()
        total = total + wrong / _spread(stream, keep)
    assert isinstance(total, Tensor)
    return total


def _visible(value: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """1 at real tokens, 0 at padding, broadcastable to `value`."""
    from rewriter.fidelity import token_mask

    mask = token_mask(batch, value)
    if mask is None:
        return torch.ones((), device=value.device)
    return mask.float().reshape(*mask.shape, *([1] * (value.dim() - mask.dim())))


def _spread(stream: Tensor, keep: Tensor) -> Tensor:
    if keep.dim() and keep.dim() != stream.dim():
        keep = torch.ones((), device=stream.device)
    count = keep.expand(*stream.shape[:-1], 1).sum().clamp_min(1.0)
    axes = tuple(range(stream.dim() - 1))
    mean = (stream * keep).sum(axes, keepdim=True) / count
    return ((stream - mean).square() * keep).sum().clamp_min(1e-12)
