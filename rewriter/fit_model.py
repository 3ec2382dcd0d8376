"""Fitting the whole model: short distillation of the original's outputs, without labels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passes.plan import Plan
from passes.substitute import Rewritten, substitute
from rewriter.fit_loop import Task, shuffled
from rewriter.fit_loss import floating, model_loss
from rewriter.fit_precision import arithmetic
from rewriter.fit_report import Recipe
from rewriter.linears import Linear, hidden_nodes, input_projections, output_projection
from rewriter.taps import Tapped

Batches = Sequence[Mapping[str, Tensor]]
Targets = tuple[list[Tensor], list[Tensor]]  # outputs, hidden states
HALF_MOST = torch.finfo(torch.float16).max


def teacher_of(rewritten: Rewritten) -> Rewritten:
    """The original: the same graph with `exact` at every site and the traced weights."""
    teacher = substitute(rewritten.traced, rewritten.sites, Plan({}))
    for param in teacher.module.parameters():
        param.requires_grad_(False)
    return teacher


class Teacher:
    """The original's outputs and hidden states of each batch; kept in float16 up to a limit."""

    def __init__(
        self, teacher: Rewritten, batches: Batches, max_bytes: int, precision: str = "float32"
    ) -> None:
        self.batches, self.max_bytes, self.held = batches, max_bytes, 0
        self.precision = precision
        self.model = Tapped(teacher.module, hidden_nodes(teacher))
        self.kept: dict[int, Targets] = {}

    @torch.no_grad()
    def __call__(self, index: int) -> Targets:
        """(floating outputs, hidden states) of a batch."""
        if index in self.kept:
            return self.kept[index]
        with arithmetic(self.precision, self.model.module):
            outputs, hidden = self.model(**self.batches[index])
        made = (floating(outputs), hidden)
        if self.held + room(hidden) > self.max_bytes:
            return made
        # float16 holds what float32 activations say to three digits; larger values stay as they are
        small = (made[0], [half(t) for t in hidden])
        size = sum(t.numel() * t.element_size() for part in small for t in part)
        if self.held + size <= self.max_bytes:
            self.kept[index] = small
            self.held += size
        return small


def room(values: Iterable[Any]) -> int:
    """Bytes that the tensors among `values` take at least when they are kept as float16."""
    return sum(v.numel() * min(v.element_size(), 2) for v in values if isinstance(v, Tensor))


def half(value: Tensor) -> Tensor:
    """`value` as float16, or as it is where that would overflow."""
    low, high = torch.aminmax(value)
    fits = float(low) >= -HALF_MOST and float(high) <= HALF_MOST  # not so for NaN
    return value.half() if fits else value


def end_task(
    rewritten: Rewritten,
    teacher: Rewritten,
    batches: Batches,
    validation: Batches,
    recipe: Recipe,
    seconds: float,
    seed: int,
) -> Task:
    """The end-to-end stage over all calibration batches."""
    student = Tapped(rewritten.module, hidden_nodes(rewritten))
    targets = Teacher(teacher, batches, recipe.cache_bytes, recipe.precision)

    def loss(step: int, done: float) -> Tensor:
        index = shuffled(step, len(batches), seed, "end")
        outputs, hidden = targets(index)
        with arithmetic(recipe.precision, student.module):
            got, mine = student(**batches[index])
        pairs = list(zip(mine, hidden, strict=True))
        return model_loss(floating(got), outputs, pairs, batches[index])

    validate = model_gap(rewritten, teacher, validation)
    params, rates = trainable(rewritten, recipe)
    return Task("end", "end to end", "", params, rates, loss, validate, seconds, recipe.end_steps)


def model_gap(rewritten: Rewritten, teacher: Rewritten, batches: Batches) -> Callable[[], float]:
    """A function that gives the mean `model_loss` on `batches`, without hidden states."""
    wanted: list[list[Tensor]] = []

    @torch.no_grad()
    def gap() -> float:
        if not wanted:
            wanted.extend(floating(teacher.module(**b)) for b in batches)
        total = 0.0
        for target, batch in zip(wanted, batches, strict=True):
            total += float(model_loss(floating(rewritten.module(**batch)), target, [], batch))
        return total / len(batches)

    return gap


def trainable(
    rewritten: Rewritten, recipe: Recipe
) -> tuple[dict[str, nn.Parameter], dict[str, float]]:
    """(parameters of the end-to-end stage by name, their learning rates); a tied one once."""
    forms = form_names(rewritten)
    rates = dict.fromkeys(forms, recipe.form_lr)
    if recipe.train == "projections":
        rates |= dict.fromkeys(projection_names(rewritten), recipe.weight_lr)
    if recipe.train == "layers":
        skip = _tables(rewritten)
        named = rewritten.module.named_parameters()
        layers = [n for n, p in named if id(p) not in skip and n not in rates]
        rates |= dict.fromkeys(layers, recipe.weight_lr)
    return with_rates(rewritten, rates)


def with_rates(
    rewritten: Rewritten, rates: Mapping[str, float]
) -> tuple[dict[str, nn.Parameter], dict[str, float]]:
    """The floating parameters named in `rates`, and their learning rates; a tied one once.

    Frozen ones (a form's hash) are left out.
    """
    named = {n: p for n, p in rewritten.module.named_parameters() if p.requires_grad}
    params = {n: named[n] for n in rates if n in named and named[n].is_floating_point()}
    return params, {n: rates[n] for n in params}


@contextlib.contextmanager
def frozen(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block none of `params` takes a gradient."""
    held = [p for p in params if p.requires_grad]
    for param in held:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in held:
            param.requires_grad_(True)


def only(
    module: nn.Module, params: Mapping[str, nn.Parameter]
) -> contextlib.AbstractContextManager[None]:
    """Within the block no other parameter of `module` takes a gradient.

    One nobody uses costs time: that of an embedding table is as large as the table.
    """
    kept = {id(p) for p in params.values()}
    if not any(p.requires_grad for p in params.values()):
        return frozen(())  # hashes alone are learned, and a loss must have some gradient
    return frozen([p for p in module.parameters() if id(p) not in kept])


def form_names(rewritten: Rewritten) -> list[str]:
    """Names of the parameters of the rewritten sites' forms."""
    return [
        f"{prefix}{name}"
        for site in rewritten.plan.rewritten
        for prefix in [form_prefix(rewritten, site)]
        for name in rewritten.attention(site).params
    ]


def form_prefix(rewritten: Rewritten, site: str) -> str:
    """Where the parameters of a site's form are in the module's names."""
    module = rewritten.attention(site)
    name = next(n for n, m in rewritten.module.named_modules() if m is module)
    return f"{name}.params."


def projections(rewritten: Rewritten, site: str) -> list[Linear]:
    """The q, k, v and output projections that serve this site alone."""
    output, _ = output_projection(rewritten, site)
    return input_projections(rewritten, site) + ([output] if output is not None else [])


def projection_names(rewritten: Rewritten) -> list[str]:
    """Parameter names of the projections of all rewritten sites, each once."""
    sites = rewritten.plan.rewritten
    names = [n for s in sites for p in projections(rewritten, s) for n in p.names]
    return list(dict.fromkeys(names))


def _tables(rewritten: Rewritten) -> set[int]:
    """ids of parameters used by an embedding lookup (a head tied to one is left alone too)."""
    module: Any = rewritten.module
    found: set[int] = set()
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            table = node.args[0]
            if table.op == "get_attr":
                path, _, leaf = str(table.target).rpartition(".")
                found.add(id(getattr(module.get_submodule(path), leaf)))
    return found
