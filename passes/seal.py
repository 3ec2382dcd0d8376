"""seal: every attention module becomes one opaque custom op, and the model is exported anew.

The ops are ``rewriter_forms::attnform_<form>(q, k, v, key_mask, bias, params, spec)``: `params` in
the order of `Form.param_names`, `spec` the text of `FormSpec.dumps`. Shapes are fixed at the
traced example sizes, as lowering needs them.
"""

from __future__ import annotations

import difflib
import functools
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from passes.errors import LoweringError
from passes.form import Form, FormSpec, form_named
from passes.graph_copy import deep_copy
from passes.linear_seal import SealedLinear, is_linear_op
from passes.linears import LinearModule
from passes.substitute import AttentionModule, Rewritten
from passes.traced import Traced

NAMESPACE = "rewriter_forms"
PREFIX = "attnform_"
NOTES = "rewriter_notes"  # key in the sealed graph module's meta: list of sentences
SITE = "attention_site"  # key in meta and in meta["custom"] of a sealed op: the site's id
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? bias, Tensor[] params, str spec)"
    " -> Tensor"
)
_LIBRARY: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_DROPOUTS = (torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default)


def op_name(form: str) -> str:
    """Name of a form's custom op inside the namespace."""
    return PREFIX + re.sub(r"\W", "_", form)


def op_of_form(form: str) -> Any:
    """The form's custom op (an OpOverload), registered on first use."""
    name = op_name(form)
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        _LIBRARY.define(name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _eager, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def is_form_op(target: object) -> bool:
    """Whether a graph node's target is one of the custom ops."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.name.startswith(
        f"{NAMESPACE}::{PREFIX}"
    )


@functools.lru_cache(maxsize=1024)
def read_spec(text: str) -> tuple[Form, FormSpec]:
    """The form and its spec from the op's last argument."""
    spec = FormSpec.loads(text)
    return form_named(spec.form, spec.config), spec


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    params: list[Tensor],
    spec: str,
) -> Tensor:
    form, facts = read_spec(spec)
    named = dict(zip(form.param_names(), params, strict=True))
    return form.attend(facts, named, q, k, v, key_mask, bias).contiguous()


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    params: list[Tensor],
    spec: str,
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


class Sealed(nn.Module):
    """An attention module as a call of its custom op; shares the parameters."""

    def __init__(self, attention: AttentionModule) -> None:
        super().__init__()
        self.params = attention.params
        self.names = attention.form.param_names()
        self.spec = attention.spec.dumps()
        self.op = op_of_form(attention.form.name)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """As `AttentionModule.forward`."""
        params = [self.params[name] for name in self.names]
        result: Tensor = self.op(q, k, v, key_mask, bias, params, self.spec)
        return result


def seal(rewritten: Rewritten) -> ExportedProgram:
    """Export a rewritten model in inference mode at the traced example sizes.

    `rewritten` is not changed and its tensors are shared, not copied. The sealed program's nodes
    keep the module path of the node they come from in ``meta["nn_module_stack"]``; a custom op's
    node also holds its site's id in ``meta["custom"]["attention_site"]``. Sentences for the
    report are in ``program.graph_module.meta["rewriter_notes"]``.

    Raises:
        LoweringError: torch can not export the rewritten model.
    """
    module, notes = _inference_copy(rewritten.module)
    traced = rewritten.traced
    try:
        with torch.no_grad():
            program = torch.export.export(
                module, traced.example_args, traced.example_kwargs, strict=False
            )
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoweringError(f"the rewritten model can not be exported: {first}") from error
    _copy_origins(module.graph, program.graph_module.graph)
    program.graph_module.meta[NOTES] = [*traced.notes, *notes, *specialised(traced)]
    return program


def specialised(traced: Traced) -> tuple[str, ...]:
    """A sentence for every dynamic dimension that sealing fixes."""
    sizes: dict[str, set[str]] = {}
    inputs = _named_inputs(traced)
    for name, axes in traced.dynamic.items():
        for axis, dimension in axes.items():
            tensor = inputs.get(name)
            size = str(tensor.shape[axis]) if isinstance(tensor, Tensor) else "its example size"
            sizes.setdefault(dimension, set()).add(size)
    return tuple(
        f"dynamic dimension {dimension!r} is fixed at {' and '.join(sorted(found))}"
        for dimension, found in sorted(sizes.items())
    )


def _named_inputs(traced: Traced) -> dict[str, Any]:
    names = [str(n.target) for n in traced.module.graph.find_nodes(op="placeholder")]
    positional = dict(zip(names, traced.example_args, strict=False))
    return {**positional, **traced.example_kwargs}


def _inference_copy(module: GraphModule) -> tuple[GraphModule, list[str]]:
    """The graph with ops for attention modules and without dropout; tensors shared."""
    graph = deep_copy(module.graph)
    dropped = _drop_dropout(graph)
    sealed = GraphModule(module, graph)
    for name, child in module.named_modules():
        if isinstance(child, AttentionModule):
            sealed.set_submodule(name, Sealed(child))
        elif isinstance(child, LinearModule):
            sealed.set_submodule(name, SealedLinear(child))
    notes = [f"{dropped} dropouts recorded in training mode are left out"] if dropped else []
    return sealed.eval(), notes


def _drop_dropout(graph: Graph) -> int:
    live = 0
    for node in list(graph.nodes):
        if node.target in _DROPOUTS:
            live += bool(node.args[2]) and node.args[1] != 0
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return live


def _copy_origins(source: Graph, exported: Graph) -> None:
    """Give exported nodes the module paths of the nodes they were exported from.

    Export replays the graph op by op, so both node lists hold the same ops in the same order,
    apart from what export adds or folds; equal stretches are matched.
    """
    before = [n for n in source.nodes if n.op in ("call_function", "call_module")]
    after = [n for n in exported.nodes if n.op == "call_function"]
    matcher = difflib.SequenceMatcher(
        None, [_label(n) for n in before], [_label(n) for n in after], autojunk=False
    )
    for block in matcher.get_matching_blocks():
        for i in range(block.size):
            _copy_origin(before[block.a + i], after[block.b + i])


def _label(node: Node) -> str:
    if node.op == "call_module" or is_form_op(node.target) or is_linear_op(node.target):
        return "module"
    return str(node.target)


def _copy_origin(source: Node, exported: Node) -> None:
    for key in ("nn_module_stack", "source_fn_stack", "stack_trace"):
        if source.meta.get(key):
            exported.meta[key] = source.meta[key]
    site = source.meta.get(SITE)
    if site is not None:
        exported.meta[SITE] = site.id
        exported.meta["custom"] = {**exported.meta.get("custom", {}), SITE: site.id}
