"""From an exported program to a Relax module, with the big operators kept whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from codegen import tvm_env
from codegen.converters import converters
from codegen.converters.attention import convert_form, convert_step
from codegen.fold import fold_constants
from codegen.index_ranges import index_range
from codegen.projections import merge_projections
from codegen.specs import TensorSpec
from codegen.target import Target
from passes.errors import LoweringError
from passes.graph_copy import without_torchs_own_warnings

if TYPE_CHECKING:
    from torch.fx import Node

# Not decomposed: a kernel or a fused epilogue exists for the whole operator.
KEPT = (
    "linear.default", "scaled_dot_product_attention.default", "gelu.default",
    "layer_norm.default", "rms_norm.default", "softmax.int", "silu.default",
    "embedding.default", "group_norm.default",
)  # fmt: skip
_FORM_PREFIX, _STEP_PREFIX = "attnform_", "attnstep_"


@dataclass(frozen=True)
class Imported:
    """A Relax module whose "main" takes the inputs in order and returns a tuple of outputs."""

    mod: Any
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    notes: tuple[str, ...] = ()


def to_relax(ep: ExportedProgram, target: Target) -> Imported:
    """Import `ep` (static shapes) for `target`.

    Raises:
        LoweringError: a dynamic dimension, an input that is no tensor, or operators without a
            conversion (all of them at once, with module path and source line).
    """
    _refuse_dynamic(ep)
    ep = _decomposed(ep)
    notes = tuple(ep.graph_module.meta.get("rewriter_notes", ()))
    _drop_constant_inputs(ep)
    fold_constants(ep)
    merge_projections(ep)
    inputs = list(_input_specs(ep))
    outputs = _output_specs(ep)
    custom = _conversions(ep)
    _refuse_unsupported(ep, custom)
    with tvm_env.lowering_for(target):
        mod = _import(ep, custom)
    return Imported(mod, inputs, outputs, notes)


def _import(ep: ExportedProgram, custom: Mapping[str, Any]) -> Any:
    from tvm.relax.frontend.torch import from_exported_program

    try:
        return from_exported_program(
            ep, custom_convert_map=dict(custom), run_ep_decomposition=False
        )
    except LoweringError:
        raise
    # The importer raises whatever its converters meet (ValueError, AssertionError, KeyError, ...).
    except Exception as error:
        raise LoweringError(f"TVM's importer failed: {type(error).__name__}: {error}") from error


def _refuse_dynamic(ep: ExportedProgram) -> None:
    found = {}
    for node in ep.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            axes = [i for i, d in enumerate(value.shape) if not isinstance(d, int)]
            if axes:
                found[node.name] = axes
    if found:
        told = ", ".join(f"{name} (axes {axes})" for name, axes in found.items())
        raise LoweringError(
            f"dynamic dimensions can not be compiled yet: {told}; export with fixed example "
            "shapes (no dynamic_shapes)"
        )


def _decomposed(ep: ExportedProgram) -> ExportedProgram:
    """A decomposed copy of `ep` with the operators in KEPT whole."""
    table: Any = torch.export.default_decompositions()
    for op in list(table):
        if str(op).removeprefix("aten.") in KEPT:
            table.pop(op)
    notes = ep.graph_module.meta.get("rewriter_notes", ())
    with torch.no_grad(), without_torchs_own_warnings():
        done: ExportedProgram = ep.run_decompositions(table)
    if done is ep:
        done = copy.copy(ep)
    done.graph_module.meta["rewriter_notes"] = notes
    return done


def _drop_constant_inputs(ep: ExportedProgram) -> None:
    """Remove inputs that are None or plain numbers, and outputs that are no tensors.

    Export has burnt their values in, so their placeholders are unused.
    """
    signature = ep.graph_signature
    nodes = {n.name: n for n in ep.graph.nodes if n.op == "placeholder"}
    for spec in list(signature.input_specs):
        constant = isinstance(spec.arg, ConstantArgument)
        if spec.kind == InputKind.USER_INPUT and constant:
            node = nodes[spec.arg.name]
            if node.users:
                raise LoweringError(f"input {spec.arg.name!r} is no tensor but is used as one")
            ep.graph.erase_node(node)
            signature.input_specs.remove(spec)
    output = ep.graph.output_node()
    kept: list[Any] = []
    marks: list[int | None] = []
    for value, spec in zip(output.args[0], signature.output_specs, strict=True):
        tensor = not isinstance(spec.arg, ConstantArgument) and value is not None
        if tensor:
            kept.append((value, spec))
        if spec.kind in (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT):
            marks.append(len(marks) if tensor else None)
    output.args = (tuple(value for value, _ in kept),)
    signature.output_specs[:] = [spec for _, spec in kept]
    ep.graph_module.meta["rewriter_outputs"] = marks


def _spec(name: str, value: torch.Tensor, **limits: int | None) -> TensorSpec:
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorSpec(name, tuple(int(d) for d in value.shape), dtype, **limits)


def _input_specs(ep: ExportedProgram) -> Iterator[TensorSpec]:
    user = {s.arg.name for s in ep.graph_signature.input_specs if s.kind == InputKind.USER_INPUT}
    for node in ep.graph.nodes:
        if node.op != "placeholder" or node.name not in user:
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise LoweringError(f"input {node.name!r} is no tensor: {type(value).__name__}")
        low, high = (None, None) if value.is_floating_point() else index_range(node)
        yield _spec(node.name, value, low=low, high=high)


def _output_specs(ep: ExportedProgram) -> list[TensorSpec]:
    values = [
        node.meta["val"]
        for node, spec in zip(
            ep.graph.output_node().args[0], ep.graph_signature.output_specs, strict=True
        )
        if spec.kind in (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT)
    ]
    names = _output_names(ep, len(values))
    return [_spec(name, value) for name, value in zip(names, values, strict=True)]


def _output_names(ep: ExportedProgram, count: int) -> list[str]:
    """Names from the output's own structure: dict keys, else output, output_0, output_1, ..."""
    tree = ep.call_spec.out_spec
    plain = [f"output_{i}" for i in range(count)] if count > 1 else ["output"]
    if tree is None:
        return plain
    leaves = torch.utils._pytree.tree_unflatten(_leaves(ep, tree.num_leaves), tree)
    names = [".".join(path) or "output" for path, leaf in _paths(leaves, ()) if leaf is not None]
    if len(names) != count or len(set(names)) != count:
        return plain
    return plain if all(n.isdigit() for n in names) else names


def _leaves(ep: ExportedProgram, count: int) -> list[int | None]:
    """One mark per leaf of the output tree: None where the model returns no tensor."""
    marks = ep.graph_module.meta.get("rewriter_outputs")
    return list(marks) if marks is not None and len(marks) == count else list(range(count))


def _paths(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _paths(item, (*path, str(key)))
    elif isinstance(value, (tuple, list)):
        for at, item in enumerate(value):
            yield from _paths(item, (*path, str(at)))
    else:
        yield path, value


def _conversions(ep: ExportedProgram) -> dict[str, Any]:
    """Our conversions plus one entry for every sealed form in the graph."""
    found = dict(converters())
    for node in ep.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name.startswith(_FORM_PREFIX):
            found[name] = convert_form
        if node.op == "call_function" and name.startswith(_STEP_PREFIX):
            found[name] = convert_step
    return found


def _refuse_unsupported(ep: ExportedProgram, custom: Mapping[str, Any]) -> None:
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    known = ExportedProgramImporter().convert_map.keys() | custom.keys()
    missing = [
        node
        for node in ep.graph.nodes
        if node.op == "call_function" and getattr(node.target, "__name__", "") not in known
    ]
    if missing:
        lines = dict.fromkeys(f"  {_where(node)}" for node in missing)
        raise LoweringError("these operators can not be lowered to TVM yet:\n" + "\n".join(lines))


def _where(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    module = list(stack.values())[-1][0] if stack else ""
    lines = [s.strip() for s in (node.meta.get("stack_trace") or "").splitlines()]
    files = [line for line in lines if line.startswith("File ")]
    return (
        f"{node.target} in {module or 'the model itself'} ({files[-1] if files else 'no source'})"
    )
