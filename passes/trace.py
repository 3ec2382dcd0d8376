"""trace: a model and example inputs -> an ATen-level graph that still trains.

torch.export (training IR, before any decomposition), and torch.fx.symbolic_trace where export
can not. Parameters are shared with the model, not copied. Dropout and batch norm are recorded as
the model's mode (train or eval) has them; ``module.train()`` does not change recorded calls.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from passes.errors import InputError, TraceError
from passes.trace_dynamic import (
    auto_axes,
    batch_only,
    read_dynamic,
    size_limits,
    suggestion,
    to_dims,
    widened,
)
from passes.trace_errors import explain, reason
from passes.trace_inputs import CHECK, Inputs, check_call, named_inputs, split_inputs
from passes.traced import Traced

_NOISY = ("torch.fx.experimental.symbolic_shapes", "torch._export", "torch.export")


def trace(model: Any, example_inputs: Inputs, *, dynamic_shapes: Any = None) -> Traced:
    """Trace `model` (nn.Module, GraphModule or ExportedProgram) on `example_inputs`.

    Args:
        model: what to trace; its mode (train or eval) is traced as it is and not changed.
        example_inputs: a tuple, or a dict from forward's argument names, of tensors (None and
            bool are baked in). May be empty for an ExportedProgram that carries its own.
        dynamic_shapes: None (every shape is fixed); torch's own form; the short form
            ``{"input_ids": {0: "batch", 1: "seq"}}``; or "auto": as dynamic as the model allows.
            Bounds that torch asks for are taken, with a note.

    Raises:
        InputError: example inputs that do not fit forward.
        TraceError: the model can not be traced; carries torch's suggestion and the model's line.
    """
    if isinstance(model, ExportedProgram):
        return _from_program(model, example_inputs)
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch module, got {type(model).__name__}")
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "auto":
        raise InputError(f"dynamic_shapes: {dynamic_shapes!r} is not known; the word is 'auto'")
    args, kwargs = split_inputs(model, example_inputs)
    job = _Job(model, args, kwargs)
    with _quiet(), _plain_attention(), _no_cache(model):
        try:
            program, spec, notes = _export(job, dynamic_shapes)
        except InputError:
            raise
        except Exception as error:
            return _fall_back(job, dynamic_shapes, error)
    return _to_traced(program, job, spec, notes, training=model.training)


@dataclass(frozen=True)
class _Job:
    """One model with its inputs, as called."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def named(self) -> dict[str, Any]:
        return named_inputs(self.model, self.args, self.kwargs)

    def export(self, spec: Any) -> ExportedProgram:
        """Export once with torch's form `spec`."""
        values = widened(self.named, spec)
        args = tuple(list(values.values())[: len(self.args)])
        kwargs = {name: values[name] for name in self.kwargs}
        # On failure torch prints the graph so far to stderr.
        with contextlib.redirect_stderr(io.StringIO()):
            return torch.export.export(
                self.model, args, kwargs=kwargs, dynamic_shapes=spec, strict=False
            )


def _export(job: _Job, wanted: Any) -> tuple[ExportedProgram, Any, list[str]]:
    if wanted is None:
        return job.export(None), None, []
    if wanted == "auto":
        return _export_auto(job)
    return _export_asked(job, wanted)


def _export_auto(job: _Job) -> tuple[ExportedProgram, Any, list[str]]:
    notes: list[str] = []
    for what, spec in (("all", auto_axes(job.named)), ("batch", batch_only(job.named))):
        try:
            return job.export(spec), None, notes
        except Exception as error:
            left = "trying the batch alone" if what == "all" else "traced with fixed shapes"
            notes.append(f"dynamic shapes ({what} axes) are not possible, {left}: {reason(error)}")
    return job.export(None), None, notes


def _export_asked(job: _Job, wanted: Any) -> tuple[ExportedProgram, Any, list[str]]:
    notes: list[str] = []
    bounds: dict[str, dict[str, int]] = {}
    for _ in range(3):  # a bound on one dimension can uncover the next
        try:
            return job.export(to_dims(wanted, job.named, bounds)), wanted, notes
        except InputError:
            raise
        except Exception as error:
            asked = suggestion(str(error))
            new = {k: v for k, v in asked.bounds.items() if bounds.get(k) != v}
            if asked.fixed or not new or not isinstance(wanted, Mapping):
                raise
            bounds.update(new)
            notes += [_bound_note(name, bound) for name, bound in new.items()]
    return job.export(to_dims(wanted, job.named, bounds)), wanted, notes


def _bound_note(name: str, bound: Mapping[str, int]) -> str:
    words = " and ".join(f"{side} {value}" for side, value in bound.items())
    return f"dimension {name!r} is limited to {words}, as the model requires"


def _fall_back(job: _Job, wanted: Any, error: Exception) -> Traced:
    """symbolic_trace after export failed, or a TraceError that says why both did."""
    _check_runs(job)
    if wanted is not None and wanted != "auto":
        raise TraceError(explain(job.model, error)) from error
    try:
        graph_module = _symbolic(job)
    except Exception as second:
        raise TraceError(explain(job.model, error, second)) from error
    note = f"traced by symbolic_trace (shapes fixed), since torch.export can not: {reason(error)}"
    nn.Module.train(graph_module, job.model.training)
    return Traced(graph_module, job.args, job.kwargs, {}, "symbolic_trace", (note,))


def _check_runs(job: _Job) -> None:
    """`InputError` if the model does not even run on its example inputs."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            job.model(*job.args, **job.kwargs)
    except Exception as error:
        raise InputError(
            f"the model does not run on its example inputs: {explain(job.model, error)}"
        ) from error


def _symbolic(job: _Job) -> fx.GraphModule:
    named = job.named
    fixed = {
        name: p.default
        for name, p in inspect.signature(job.model.forward).parameters.items()
        if name not in named and p.default is not p.empty
    }
    fixed |= {k: v for k, v in named.items() if not isinstance(v, torch.Tensor)}
    graph = fx.Tracer().trace(job.model, concrete_args=fixed or None)
    module = fx.GraphModule(job.model, graph)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        module(*job.args, **job.kwargs)
    return module


def _from_program(program: ExportedProgram, inputs: Inputs) -> Traced:
    args, kwargs = program.example_inputs or ((), {})
    module = program.module(check_guards=False)
    if inputs:
        args, kwargs = split_inputs(module, inputs)
    elif not args and not kwargs:
        raise InputError("example_inputs: the exported program carries none; give them")
    dropouts = [n for n in program.graph.nodes if n.target is torch.ops.aten.dropout.default]
    job = _Job(module, tuple(args), dict(kwargs))
    return _to_traced(program, job, None, [], training=any(n.args[2] for n in dropouts))


def _to_traced(
    program: ExportedProgram, job: _Job, spec: Any, notes: list[str], *, training: bool
) -> Traced:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    for name in ("train", "eval"):  # torch forbids them on exported modules; ours trains
        module.__dict__.pop(name, None)
    # torch's own input check wants the keywords of the trace; ours also takes them by position.
    module._forward_pre_hooks.clear()
    module._forward_pre_hooks_with_kwargs.clear()
    module.train(training)
    values = {str(n.target): n.meta.get("val") for n in module.graph.find_nodes(op="placeholder")}
    module.meta[CHECK] = {
        name: (v.dim(), size_limits(v, program.range_constraints))
        for name, v in values.items()
        if isinstance(v, torch.Tensor)
    }
    module.register_forward_pre_hook(check_call, with_kwargs=True)
    dynamic = read_dynamic(values, spec)
    return Traced(module, job.args, job.kwargs, dynamic, "export", tuple(notes))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's logs of failed attempts off the terminal; the errors carry what matters."""
    before = {name: logging.getLogger(name).level for name in _NOISY}
    try:
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Switch off nn.MultiheadAttention's fused path, which hides its attention in one op."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """Set use_cache to False in every Hugging Face config of `model`, so no cache is returned."""
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(c): c for c in found if getattr(c, "use_cache", False) is True}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
