"""seal for generation: the model over a few tokens, every attention a call that carries a state.

The model is traced again with ``input_ids`` and ``position_ids`` [B, T] for T new tokens (1, or a
chunk of a prompt). Each site's softmax is replaced by one op
``rewriter_forms::attnstep_<form>(q, k, v, state, position, params, spec) -> [out, *new state]``
with the form, parameters and weights of the rewritten model, whose linear forms stand at the same
layers. The mask of the new trace is not
used: positions and the state say which tokens are seen, as `Streaming.streams` demands.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from passes.canonicalise import canonicalise
from passes.decode_form import StateSpec, Streaming
from passes.errors import FormError, LoweringError, ModelError, RewriterError
from passes.find import find
from passes.graph_copy import deep_copy
from passes.linear_seal import seal_linears
from passes.linears import linear_modules
from passes.rewire import SHARED
from passes.seal import _LIBRARY, NAMESPACE, NOTES, _drop_dropout, read_spec
from passes.site import AttentionSite
from passes.substitute import AttentionModule, Rewritten
from passes.trace import trace
from passes.traced import Traced

PREFIX = "attnstep_"
TOKENS, POSITIONS, LOGITS = "input_ids", "position_ids", "logits"
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor[] state, Tensor position, Tensor[] params, str spec)"
    " -> Tensor[]"
)
_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class SealedStep:
    """A program (input_ids, position_ids, *states) -> (logits [B, V], *new states).

    `logits` are those of the last of its `tokens` tokens. `states` are all sites' in turn, made for
    sequences of up to `length` tokens.
    """

    program: ExportedProgram
    tokens: int
    length: int
    states: tuple[StateSpec, ...]


def step_op(form: str) -> Any:
    """The form's custom op for steps (an OpOverload), registered on first use."""
    name = PREFIX + re.sub(r"\W", "_", form)
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        _LIBRARY.define(name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _eager, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: list[Tensor],
    position: Tensor,
    params: list[Tensor],
    spec: str,
) -> list[Tensor]:
    form, facts = read_spec(spec)
    assert isinstance(form, Streaming)
    named = dict(zip(form.param_names(), params, strict=True))
    out, new = form.step(facts, named, q, k, v, state, position)
    return [out.contiguous(), *new]


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: list[Tensor],
    position: Tensor,
    params: list[Tensor],
    spec: str,
) -> list[Tensor]:
    return [q.new_empty((*q.shape[:-1], v.shape[-1])), *(torch.empty_like(s) for s in state)]


class SealedStepModule(nn.Module):
    """A site's attention as a call of its step op; shares the parameters."""

    def __init__(self, attention: AttentionModule) -> None:
        super().__init__()
        self.params = attention.params
        self.names = attention.form.param_names()
        self.spec = attention.spec.dumps()
        self.op = step_op(attention.form.name)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, *state: Tensor
    ) -> list[Tensor]:
        """[out [B, H, T, E], *new state] as `Streaming.step`."""
        params = [self.params[name] for name in self.names]
        result: list[Tensor] = self.op(q, k, v, list(state), position, params, self.spec)
        return result


def seal_step(model: Any, rewritten: Rewritten, *, tokens: int, length: int) -> SealedStep:
    """Export one step over `tokens` new tokens of sequences of up to `length` tokens.

    Args:
        model: the module `rewritten` was made from; its forward takes input_ids and position_ids
            [B, T] and gives logits [B, T, V] (alone, first, or under the name "logits").
        rewritten: says the batch size, and every site's form, parameters and weights.

    Raises:
        ModelError: a forward without those inputs, or whose layers differ by length.
        FormError: a site that can not go token by token, named with the reason.
        LoweringError: torch can not export the step.
    """
    check_streams(rewritten)
    traced = _trace(model, _batch(rewritten), tokens)
    sites = _sites(traced, rewritten)
    module = GraphModule(traced.module, deep_copy(traced.module.graph))
    _take_weights(module, rewritten.module)
    seal_linears(module, linear_modules(rewritten.module))
    states = _rewire(module, sites, rewritten, length)
    program = _export(module.eval(), traced, states)
    return SealedStep(program, tokens, length, tuple(states))


def check_streams(rewritten: Rewritten) -> None:
    """`FormError` that names every site which can not go token by token, and why."""
    lines = []
    for site in rewritten.sites:
        form = rewritten.attention(site.id).form
        if not isinstance(form, Streaming):
            lines.append(f"  {site.id}: {form.name} has no token-by-token form")
        elif set(form.rewires(site)) - {SHARED}:
            lines.append(f"  {site.id}: {form.name} changes the graph around it")
        elif not (verdict := form.streams(site)):
            lines.append(f"  {site.id}: {form.name}: {verdict}")
    if lines:
        raise FormError(
            "this model can not be compiled for generation; use another form there "
            "(rewriter forms):\n" + "\n".join(lines)
        )


def _batch(rewritten: Rewritten) -> int:
    traced = rewritten.traced
    first = [*traced.example_args, *traced.example_kwargs.values()][0]
    return int(first.shape[0])


def _trace(model: Any, batch: int, tokens: int) -> Traced:
    inputs = {
        TOKENS: torch.zeros(batch, tokens, dtype=torch.long),
        POSITIONS: torch.arange(tokens).expand(batch, tokens).contiguous(),
    }
    try:
        return canonicalise(trace(model, inputs))
    except RewriterError as error:
        raise ModelError(
            f"the model can not be run on {tokens} tokens by input_ids and position_ids, which "
            f"generating needs: {error}"
        ) from error


def _sites(traced: Traced, rewritten: Rewritten) -> dict[str, AttentionSite]:
    found = {site.id: site for site in find(traced).sites}
    wanted = {site.id for site in rewritten.sites}
    if found.keys() != wanted:
        odd = ", ".join(sorted(found.keys() ^ wanted))
        raise ModelError(
            f"the model has other attentions when it runs on few tokens with position_ids: {odd}"
        )
    return found


def _take_weights(module: GraphModule, source: nn.Module) -> None:
    """The (perhaps fitted) parameters and buffers of `source` in place of those of one name."""
    theirs = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    names = [*dict(module.named_parameters()), *dict(module.named_buffers())]
    for name in names:
        if name not in theirs:
            continue
        path, _, leaf = name.rpartition(".")
        owner = _own(module, path)
        table: Any = owner._parameters if leaf in owner._parameters else owner._buffers
        table[leaf] = theirs[name]


def _own(module: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`, copied (not its tensors) so that the traced model stays as it is."""
    for name in path.split(".") if path else ():
        child = copy.copy(getattr(module, name))
        child._parameters, child._buffers = dict(child._parameters), dict(child._buffers)
        child._modules = dict(child._modules)
        module._modules = dict(module._modules)
        module._modules[name] = child
        module = child
    return module


def _rewire(
    module: GraphModule, sites: Mapping[str, AttentionSite], rewritten: Rewritten, length: int
) -> list[StateSpec]:
    """Put step modules at the sites, states among inputs and outputs; the states' specs."""
    graph = module.graph
    _drop_dropout(graph)
    inputs = {str(n.target): n for n in graph.find_nodes(op="placeholder")}
    last, position = list(inputs.values())[-1], inputs[POSITIONS]
    states: list[StateSpec] = []
    new: list[Node] = []
    for node in [n for n in graph.nodes if "attention_site" in n.meta]:
        site = sites[node.meta["attention_site"].id]
        attention = rewritten.attention(site.id)
        assert isinstance(attention.form, Streaming)
        specs = attention.form.state(replace(site, mask=attention.site.mask), length)
        given = []
        for spec in specs:
            with graph.inserting_after(last):
                last = graph.placeholder(f"state_{len(states)}")
            states.append(replace(spec, name=str(last.target)))
            given.append(last)
        new += _replace(module, node, attention, position, given)
    _outputs(module, new)
    graph.set_codegen(CodeGen())
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return states


def _replace(
    module: GraphModule,
    node: Node,
    attention: AttentionModule,
    position: Node,
    state: Sequence[Node],
) -> list[Node]:
    """A step in the place of an SDPA node; the nodes of its new state."""
    target = "step_" + re.sub(r"\W+", "_", attention.site.id)
    module.add_submodule(target, SealedStepModule(attention))
    graph = node.graph
    q, k, v = node.args[:3]
    keys = q if attention.site.shared else k
    with graph.inserting_before(node):
        call = graph.call_module(target, (q, keys, v, position, *state))
        parts = [_item(graph, call, i) for i in range(len(state) + 1)]
    call.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    node.replace_all_uses_with(parts[0])
    graph.erase_node(node)
    return parts[1:]


def _item(graph: Graph, call: Node, index: int) -> Node:
    return graph.call_function(operator.getitem, (call, index))


def _outputs(module: GraphModule, states: list[Node]) -> None:
    """Return the last token's logits [B, V] and the states; other outputs are dropped."""
    graph = module.graph
    output = graph.output_node()
    logits = _logits(graph, output)
    aten = torch.ops.aten
    with graph.inserting_before(output):
        if logits.target is _LINEAR and len(logits.users) == 1:
            # The rows of earlier tokens would be computed for nothing.
            rows = graph.call_function(aten.slice.Tensor, (logits.args[0], 1, -1, 2**62))
            logits = graph.call_function(_LINEAR, (rows, *logits.args[1:]), logits.kwargs)
        value = graph.call_function(aten.select.int, (logits, 1, -1))
    output.args = ((value, *states),)


def _logits(graph: Graph, output: Node) -> Node:
    leaves = pytree.tree_leaves(output.args[0])
    info: Any = getattr(graph._codegen, "pytree_info", None)
    names: Any = None if info is None else info.out_spec
    chosen: Any = leaves[0] if leaves else None
    if names is not None and names.num_leaves == len(leaves):
        tree = pytree.tree_unflatten(leaves, names)
        if isinstance(tree, Mapping) and LOGITS in tree:
            chosen = tree[LOGITS]
    value = chosen.meta.get("val") if isinstance(chosen, Node) else None
    if not isinstance(value, Tensor) or value.dim() != 3:
        raise ModelError(
            "the model gives no logits [batch, tokens, vocabulary] (its first output, or the one "
            'called "logits"); generating needs a language model with its head'
        )
    assert isinstance(chosen, Node)
    return chosen


def _export(module: GraphModule, traced: Traced, states: Sequence[StateSpec]) -> ExportedProgram:
    given = {**dict(traced.example_kwargs)}
    args = [*traced.example_args, *given.values(), *(s.zeros() for s in states)]
    try:
        with torch.no_grad():
            program = torch.export.export(module, tuple(args), strict=False)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoweringError(f"the model can not be exported for generation: {first}") from error
    program.graph_module.meta[NOTES] = []
    return program
