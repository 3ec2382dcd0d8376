"""Traced: a model as an ATen-level graph together with what it was traced with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Traced:
    """A traced model.

    `module` runs as ``module(*args, **kwargs)`` with the model's own signature and trains.
    `dynamic` names the dynamic axes: input name -> axis -> name of the dimension. `tracer` is
    "export" or "symbolic_trace"; `notes` are sentences for the report.
    """

    module: torch.fx.GraphModule
    example_args: tuple[Any, ...]
    example_kwargs: dict[str, Any]
    dynamic: dict[str, dict[int, str]]
    tracer: str
    notes: tuple[str, ...] = ()
