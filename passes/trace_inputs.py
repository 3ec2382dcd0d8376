"""Checks of example inputs before a trace, and of a traced module's inputs at every call."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from passes.errors import InputError

Inputs = tuple[Any, ...] | Mapping[str, Any]
CHECK = "input_checks"  # module.meta: input name -> (dtype, ((axis, low, high), ...))


def split_inputs(model: Any, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`inputs` as (args, kwargs) for `model`, checked.

    Raises:
        InputError: empty, unknown or missing names, values that are not tensors, empty
            tensors, NaN; the message names the argument.
    """
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, tuple | list | Mapping):
        raise InputError(
            f"example_inputs: expected a tuple or dict of tensors, got {type(inputs).__name__}"
        )
    if not inputs:
        raise InputError(
            "example_inputs is empty; give one tensor for each argument of forward: "
            + ", ".join(_parameters(model))
        )
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    _check_binds(model, args, kwargs)
    for name, value in named_inputs(model, args, kwargs).items():
        _check_value(name, value)
    return args, kwargs


def named_inputs(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every input by the name `forward` gives it, in call order."""
    names = list(_parameters(model))
    names += [f"args_{i}" for i in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _parameters(model: Any) -> dict[str, inspect.Parameter]:
    return {
        name: p
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def _check_binds(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    signature = inspect.signature(model.forward)
    known = _parameters(model)
    open_ended = {p.kind for p in signature.parameters.values()}
    for name in kwargs:
        if not isinstance(name, str):
            raise InputError(f"example_inputs: names must be strings, got {name!r}")
        if name not in known and inspect.Parameter.VAR_KEYWORD not in open_ended:
            raise InputError(f"example input {name!r}: {_not_an_argument(name, known)}")
        if name not in known and _near(name, known):
            raise InputError(f"example input {name!r}: {_not_an_argument(name, known)}")
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"example_inputs do not fit forward({', '.join(known)}): {error}"
        ) from None


def _near(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)


def _not_an_argument(name: str, known: Iterable[str]) -> str:
    near = _near(name, known)
    if near:
        return f"forward has no such argument; did you mean {' or '.join(near)}?"
    return f"forward has no such argument; it takes {', '.join(known)}"


def _check_value(name: str, value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"example input {name!r}: expected a tensor, got {type(value).__name__}; "
            "wrap the model so that its forward takes tensors only"
        )
    if value.numel() == 0:
        raise InputError(f"example input {name!r}: empty tensor of shape {tuple(value.shape)}")
    if value.is_floating_point() and bool(torch.isnan(value).any()):
        raise InputError(f"example input {name!r}: contains NaN")


def check_call(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a traced module: its shapes are baked in, so a wrong one must not pass.

    Raises:
        InputError: an input whose rank, dtype or size is not one the trace allows.
    """
    checks: Mapping[str, Any] = getattr(module, "meta", {}).get(CHECK) or {}
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return
    for name, value in {**dict(zip(checks, args, strict=False)), **kwargs}.items():
        if name in checks and isinstance(value, torch.Tensor):
            _check_against(name, value, *checks[name])


def _check_against(
    name: str, value: torch.Tensor, rank: int, axes: Iterable[tuple[int, int, int | None]]
) -> None:
    if value.dim() != rank:
        raise InputError(f"input {name!r}: traced with {rank} axes, got shape {tuple(value.shape)}")
    for axis, low, high in axes:
        size = value.shape[axis]
        if size < low or (high is not None and size > high):
            allowed = str(low) if low == high else f"{low} to {'any' if high is None else high}"
            raise InputError(
                f"input {name!r}: axis {axis} has size {size}, traced for {allowed}; "
                "trace again with this size, or with a dynamic axis"
            )
