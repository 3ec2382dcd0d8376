"""MODEL as ``package.module:factory``: a callable that returns a module and its example inputs."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from passes.errors import ModelError, UnknownName
from passes.trace_inputs import named_inputs
from rewriter.loaded import LoadedModel, Options


def load_factory(spec: str, options: Options | None = None) -> LoadedModel:
    """Call the factory named by `spec`; the working directory is importable.

    A Hugging Face model may come without inputs: they are then made by its config and `options`.

    Raises:
        ModelError: the module can not be imported, the factory raised (the message carries its
            error and line) or returned something else.
        UnknownName: the module has no such name.
    """
    module_name, _, name = spec.partition(":")
    factory = _attribute(spec, _import(spec, module_name), name)
    if not callable(factory):
        raise ModelError(f"factory {spec}: {name} is not callable ({type(factory).__name__})")
    try:
        made = factory()
    except Exception as error:
        raise ModelError(f"factory {spec} raised {_told(error)}") from error
    if isinstance(made, LoadedModel):
        return made
    if isinstance(made, nn.Module) and hasattr(made, "main_input_name"):
        made = _with_inputs(made, options or Options())
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise ModelError(
            f"factory {spec} returned {_shape(made)}; it must return (torch module, example "
            "inputs), where the inputs are a tuple of tensors or a dict by forward's names"
        )
    model, inputs = made
    return LoadedModel(model, _named(spec, model, inputs), spec, "other", None, f"factory {spec}")


def _with_inputs(model: nn.Module, options: Options) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from rewriter.hf_models import example_inputs
    from rewriter.plain import plain

    inputs, _ = example_inputs(model, options)
    return plain(model.eval(), tuple(inputs)), inputs


def _import(spec: str, module_name: str) -> ModuleType:
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ModelError(
                f"factory {spec}: no module {error.name!r} (looked in {here} and the installed "
                "packages)"
            ) from error
        raise ModelError(f"factory {spec}: importing it raised {_told(error)}") from error
    except Exception as error:
        raise ModelError(f"factory {spec}: importing it raised {_told(error)}") from error
    finally:
        if added:
            sys.path.remove(here)


def _attribute(spec: str, module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UnknownName(f"factory of {spec.partition(':')[0]}", name, public)
    return getattr(module, name)


def _named(spec: str, model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if isinstance(inputs, tuple | list):
        inputs = named_inputs(model, tuple(inputs), {})
    if not isinstance(inputs, Mapping) or not inputs:
        raise ModelError(
            f"factory {spec}: example inputs must be a tuple of tensors or a dict by forward's "
            f"names, got {_shape(inputs)}"
        )
    return dict(inputs)


def _shape(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(type(v).__name__ for v in value)})"
    return "an empty value" if value in ((), [], {}) else f"a {type(value).__name__}"


def _told(error: BaseException) -> str:
    """The error's type and text, with the file and line of the innermost frame of user code."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "importlib" not in f.filename and Path(f.filename) != Path(__file__)
    ]
    own = [f for f in frames if "/site-packages/" not in f.filename] or frames
    where = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {error}{where}"
