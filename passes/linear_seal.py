"""Sealed linear layers: one opaque custom op a form, whose tensors are the packed codes.

``rewriter_linears::linform_<form>(x, tensors, spec)``: `tensors` in the order of
`LinearForm.packed_names`, then the bias if there is one; `spec` the text of `LinearSpec.dumps`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.errors import ModelError
from passes.linear_form import LinearForm, LinearSpec, linear_form_named
from passes.linear_layers import find_linears
from passes.linears import LinearModule, replace_linear

NAMESPACE, PREFIX = "rewriter_linears", "linform_"
_SCHEMA = "(Tensor x, Tensor[] tensors, str spec) -> Tensor"
_LIBRARY: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def op_name(form: str) -> str:
    """Name of a linear form's custom op inside the namespace."""
    return PREFIX + re.sub(r"\W", "_", form)


def op_of_linear(form: str) -> Any:
    """The form's custom op (an OpOverload), registered on first use."""
    name = op_name(form)
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        _LIBRARY.define(name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _eager, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def is_linear_op(target: object) -> bool:
    """Whether a graph node's target is one of the custom ops."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.name.startswith(
        f"{NAMESPACE}::{PREFIX}"
    )


@functools.lru_cache(maxsize=1024)
def read_linear(text: str) -> tuple[LinearForm, LinearSpec]:
    """The form and its spec from the op's last argument."""
    spec = LinearSpec.loads(text)
    return linear_form_named(spec.form, spec.config), spec


def tensor_names(form: LinearForm, spec: LinearSpec) -> tuple[str, ...]:
    """Names of the op's tensors in order."""
    return (*form.packed_names(spec), *(("bias",) if spec.bias else ()))


def _eager(x: Tensor, tensors: list[Tensor], spec: str) -> Tensor:
    form, facts = read_linear(spec)
    named = dict(zip(tensor_names(form, facts), tensors, strict=True))
    return form.run_packed(facts, named, x).contiguous()


def _fake(x: Tensor, tensors: list[Tensor], spec: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], read_linear(spec)[1].outputs))


def seal_linears(module: GraphModule, modules: Mapping[str, LinearModule]) -> None:
    """Put `modules` (by layer id) sealed at the layers of another trace of their model, in place.

    Raises:
        ModelError: a layer that this trace does not have.
    """
    layers = {layer.id: layer for layer in find_linears(module)}
    missing = [i for i in modules if i not in layers]
    if missing:
        raise ModelError(
            f"the model has no linear layer {missing[0]!r} when it runs on few tokens; leave it "
            "as it is (linear='form,pattern')"
        )
    nodes = {node.name: node for node in module.graph.nodes}
    for i, made in modules.items():
        replace_linear(module, nodes[layers[i].node], layers[i], SealedLinear(made))


class SealedLinear(nn.Module):
    """A linear module as a call of its custom op, with its codes packed."""

    def __init__(self, module: LinearModule) -> None:
        super().__init__()
        params = {n: p.detach() for n, p in module.params.items()}
        packed = module.form.pack(params)
        if "bias" in params:
            packed["bias"] = params["bias"].float()
        self.names = tensor_names(module.form, module.spec)
        for name in self.names:
            self.register_buffer(name, packed[name].contiguous())
        self.spec, self.op = module.spec.dumps(), op_of_linear(module.form.name)

    def forward(self, x: Tensor) -> Tensor:
        """As `LinearModule.forward`."""
        result: Tensor = self.op(x, [self.get_buffer(n) for n in self.names], self.spec)
        return result
