"""Hugging Face models with plain tensors in and a dict of plain tensors out.

The model itself is changed (its class becomes a subclass with another ``forward``), nothing is
wrapped around it: module paths in a trace stay the model's own ("encoder.layer.0.attention.self").
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Outputs = dict[str, Tensor]
Finish = Callable[[Outputs, dict[str, Tensor]], Outputs]


def plain(
    model: nn.Module,
    inputs: Sequence[str],
    *,
    outputs: Sequence[str] | None = None,
    finish: Finish | None = None,
) -> nn.Module:
    """`model` with ``forward(*inputs)`` returning {name: tensor}.

    Args:
        model: a Hugging Face model; changed in place and returned.
        inputs: names of the tensors that forward takes, in order.
        outputs: names to return; None: every tensor of the model's output.
        finish: makes the outputs from (outputs, inputs by name), for instance a pooling.
    """
    base = type(model)
    known = inspect.signature(base.forward).parameters
    fixed = {k: v for k, v in {"use_cache": False, "return_dict": True}.items() if k in known}

    def forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Outputs:
        given = {**dict(zip(inputs, args, strict=False)), **kwargs}
        made = base.forward(self, **given, **fixed)
        tensors = {
            k: v
            for k, v in made.items()
            if isinstance(v, Tensor) and (outputs is None or k in outputs)
        }
        return finish(tensors, given) if finish else tensors

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *inputs)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    body = {"forward": forward, "__module__": base.__module__, "__doc__": base.__doc__}
    model.__class__ = type(base.__name__, (base,), body)
    return model


def mean_pooling(normalize: bool) -> Finish:
    """Add ``sentence_embedding`` [B, width]: the mean over visible tokens, of length 1 if asked."""

    def finish(outputs: Outputs, given: dict[str, Tensor]) -> Outputs:
        hidden = outputs["last_hidden_state"]
        visible = given["attention_mask"].to(hidden.dtype).unsqueeze(-1)
        pooled = (hidden * visible).sum(1) / visible.sum(1).clamp(min=1e-9)
        if normalize:
            pooled = pooled / torch.sqrt((pooled * pooled).sum(-1, keepdim=True)).clamp(min=1e-12)
        return {"sentence_embedding": pooled, "last_hidden_state": hidden}

    return finish
