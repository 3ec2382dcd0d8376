"""Linear layers of a rewritten model: which get another form, and the modules that stand there.

Rules are globs over the layers' ids (module paths); the first that matches wins. Under a rule for
all (``*``) the first and the last linear layer of the graph keep their multiplications, because
their error is not averaged out; a rule that names them by more is followed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.errors import FormError, UnmatchedRule
from passes.linear_form import LinearForm, LinearSpec, linear_form_named
from passes.linear_layers import LinearLayer, find_linears, input_of, tensor_named
from passes.plan import KEEP, Choice
from passes.site import SiteStatus

if TYPE_CHECKING:
    from passes.substitute import Rewritten

FOLDER = "linears"
Captured = Mapping[str, Tensor]


class LinearModule(nn.Module):
    """What stands at a linear layer: `form` with its parameters; trains."""

    def __init__(
        self, layer: LinearLayer, form: LinearForm, weight: Tensor, bias: Tensor | None,
        x: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer, self.form = layer, form
        self._kept: tuple[object, Tensor] | None = None  # (state of params, rounded weight)
        self.spec = LinearSpec(
            form.name, layer.inputs, layer.outputs, bias is not None, form.config.to_json()
        )
        with torch.no_grad():
            made = form.convert(weight, bias, x)
        self.params = nn.ParameterDict(made)
        for name, param in self.params.items():
            param.requires_grad_(name not in form.frozen)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        params = dict(self.params.items())
        if torch.is_grad_enabled():
            return self.form.forward(params, x)
        state = tuple((id(p), p._version) for p in params.values())
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self.form.weight(params))
        return self.form.forward(params, x, self._kept[1])

    def __getstate__(self) -> dict[str, Any]:
        """Copies make their own weight."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """Form and layer, for print(module)."""
        return f"form={self.form.name}, layer={self.layer.id!r}"


def plan_linears(
    layers: Sequence[LinearLayer], rules: Mapping[str, LinearForm]
) -> dict[str, Choice]:
    """A choice for every layer that a rule matches, in the order of the graph.

    Raises:
        UnmatchedRule: a rule other than ``*`` that matches no layer.
    """
    unused = {pattern for pattern in rules if pattern != "*"}
    ends = {layers[0].id, layers[-1].id} if layers else set()
    made = {}
    for layer in layers:
        pattern = next((p for p in rules if fnmatch.fnmatchcase(layer.id, p)), None)
        if pattern is not None:
            unused.discard(pattern)
            made[layer.id] = _choose(layer, rules[pattern], pattern, ends)
    if unused:
        known = ", ".join(layer.id for layer in layers) or "none"
        raise UnmatchedRule(
            f"linear: {sorted(unused)[0]!r} matches no linear layer; there are: {known}"
        )
    return made


def _choose(layer: LinearLayer, form: LinearForm, pattern: str, ends: set[str]) -> Choice:
    if pattern == "*" and layer.id in ends:
        why = "the first and the last linear layer are kept; name them by a pattern to change them"
        return Choice(KEEP, {}, SiteStatus.KEPT, why)
    verdict = form.applies(layer)
    if not verdict:
        return Choice(KEEP, {}, SiteStatus.REFUSED, f"{form.name}: {verdict}")
    return Choice(form.name, form.config.to_json(), why=f"rule {pattern!r}")


def put_linears(
    rewritten: Rewritten,
    choices: Mapping[str, Choice],
    captured: Captured | None = None,
) -> tuple[str, ...]:
    """Put the chosen forms at the layers of `rewritten`, in place; ids of the changed layers.

    `captured` holds inputs [rows, K] by layer id, for forms that calibrate. The plan of
    `rewritten` is completed.

    Raises:
        UnmatchedRule: a choice for a layer the graph does not have.
        FormError: a form that refuses its layer, or a weight it can not take.
    """
    module = rewritten.module
    layers = {layer.id: layer for layer in find_linears(module)}
    unknown = [i for i in choices if i not in layers]
    if unknown:
        known = ", ".join(layers) or "none"
        raise UnmatchedRule(f"plan names linear layer {unknown[0]!r}; there are: {known}")
    made = [
        (layers[i], _module(module, layers[i], choice, (captured or {}).get(i)))
        for i, choice in choices.items()
        if choice.status is SiteStatus.REWRITTEN
    ]
    nodes = {node.name: node for node in module.graph.nodes}
    for layer, new in made:
        replace_linear(module, nodes[layer.node], layer, new)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    for layer, _ in made:
        _drop_unread(module, layer)
    rewritten.plan = replace(rewritten.plan, linears={**rewritten.plan.linears, **choices})
    return tuple(layer.id for layer, _ in made)


def _module(
    module: GraphModule, layer: LinearLayer, choice: Choice, x: Tensor | None
) -> LinearModule:
    form = linear_form_named(choice.form, choice.config)
    verdict = form.applies(layer)
    if not verdict:
        raise FormError(f"{form.name} can not stand at {layer.id}: {verdict}")
    weight = tensor_named(module, layer.weight).detach()
    weight = weight.T.contiguous() if layer.transposed else weight
    bias = None if layer.bias is None else tensor_named(module, layer.bias).detach()
    try:
        made = LinearModule(layer, form, weight, bias, x)
    except FormError as error:
        raise FormError(f"{layer.id}: {error}") from error
    return made.to(weight.device).train(module.training)


def replace_linear(module: GraphModule, node: Node, layer: LinearLayer, new: nn.Module) -> None:
    """Call `new` on the layer's input where `node` computes it."""
    target = _free_name(module, layer.id)
    module.add_submodule(target, new)
    with node.graph.inserting_before(node):
        call = node.graph.call_module(target, (input_of(node),))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)


def _free_name(module: GraphModule, layer_id: str) -> str:
    base = f"{FOLDER}.{re.sub(r'[^0-9A-Za-z_]+', '_', layer_id).strip('_') or 'layer'}"
    taken = {name for name, _ in module.named_modules()}
    names = (base, *(f"{base}_{n}" for n in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)


def _drop_unread(module: GraphModule, layer: LinearLayer) -> None:
    """Delete a replaced layer's parameters: they would be trained and saved for nothing."""
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name in (layer.weight, layer.bias):
        if name is not None and name not in read:
            path, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(path), leaf)


def linear_modules(module: nn.Module) -> dict[str, LinearModule]:
    """The linear modules of a rewritten model by their layer's id."""
    return {m.layer.id: m for m in module.modules() if isinstance(m, LinearModule)}


@torch.no_grad()
def capture_inputs(
    module: GraphModule,
    ids: Sequence[str],
    batches: Sequence[Mapping[str, Tensor]],
    most: int = 4096,
) -> dict[str, Tensor]:
    """Inputs [rows, K] of the layers `ids`, at most `most` rows each spread over the batches."""
    share = max(1, most // max(1, len(batches)))
    found: dict[str, list[Tensor]] = {i: [] for i in ids}

    def keep(layer: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        step = max(1, -(-len(rows) // share))
        found[layer].append(rows[::step].clone())

    for batch in batches:
        _watch(module, ids, batch, keep)
    return {i: torch.cat(rows)[:most] for i, rows in found.items() if rows}


@torch.no_grad()
def count_rows(
    module: GraphModule, ids: Sequence[str], batch: Mapping[str, Tensor]
) -> dict[str, int]:
    """How many rows the layers `ids` compute on `batch`: the product of their leading axes."""
    found: dict[str, int] = {}

    def keep(layer: str, x: Tensor) -> None:
        found[layer] = x.numel() // x.shape[-1]

    _watch(module, ids, batch, keep)
    return found


def _watch(
    module: GraphModule,
    ids: Sequence[str],
    batch: Mapping[str, Tensor],
    keep: Callable[[str, Tensor], None],
) -> None:
    """keep(layer id, its input) for the layers `ids` in one run on `batch`."""
    wanted = {layer.node: layer.id for layer in find_linears(module) if layer.id in ids}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            if n.name in wanted:
                keep(wanted[n.name], self.env[input_of(n)])
            return super().run_node(n)

    names = [str(n.target) for n in module.graph.find_nodes(op="placeholder")]
    Watch(module).run(*(batch[name] for name in names if name in batch))
