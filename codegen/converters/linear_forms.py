"""Sealed linear layers: ``rewriter_linears::linform_*`` -> the form's own kernel."""

from __future__ import annotations

from typing import Any

from codegen.tvm_env import current_target
from passes.linear_form import linear_forms
from passes.linear_seal import op_name, read_linear, tensor_names


def convert_linear_form(node: Any, importer: Any) -> Any:
    """The form's kernel through a LinearKit."""
    from codegen.kit_linear import LinearKit

    x, tensors, text = node.args
    form, spec = read_linear(text)
    env = importer.env
    packed = dict(zip(tensor_names(form, spec), [env[t] for t in tensors], strict=True))
    kit = LinearKit(importer.block_builder, current_target())
    return form.kernel(kit, spec, packed, env[x])


CONVERTERS = {f"{op_name(name)}.default": convert_linear_form for name in linear_forms()}
