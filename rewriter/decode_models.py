"""Language models for generating: logits out, and a forward that is told the positions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from passes.decode_seal import LOGITS, POSITIONS, TOKENS
from passes.errors import ModelError
from rewriter.loaded import LoadedModel, position_limit
from rewriter.plain import Outputs, plain

_HIDDEN = "last_hidden_state"


def language_model(loaded: LoadedModel) -> LoadedModel:
    """The model with ``forward(input_ids)`` giving {"logits": [B, T, V]}; changed in place.

    A Hugging Face model loses its other inputs (a mask of padding has no place in generating). One
    without a head is read out with its input embeddings, where its config ties them or its weights
    are random anyway. Other modules stay as they are.

    Raises:
        ModelError: a model that is not decoder-only, or has no head.
    """
    model: Any = loaded.model
    if not is_hugging_face(model):
        return loaded
    _require_decoder(model, loaded.name)
    if TOKENS not in loaded.example_inputs:
        raise ModelError(f"model {loaded.name}: it takes no {TOKENS}, so it can not generate")
    if model.get_output_embeddings() is None:
        _require_tied(model, loaded)
        made = plain(model, (TOKENS,), finish=_read_out(model))
    else:
        made = plain(model, (TOKENS,), outputs=(LOGITS,))
    inputs = {TOKENS: loaded.example_inputs[TOKENS]}
    return replace(loaded, model=made, example_inputs=inputs)


def is_hugging_face(model: nn.Module) -> bool:
    """Whether it is one of transformers' models."""
    names = {f"{c.__module__}.{c.__name__}" for c in type(model).__mro__}
    return "transformers.modeling_utils.PreTrainedModel" in names


def _require_decoder(model: Any, name: str) -> None:
    forwards = [vars(c)["forward"] for c in type(model).__mro__ if "forward" in vars(c)]
    known = [inspect.signature(f).parameters for f in forwards]
    if getattr(model.config, "is_encoder_decoder", False) or not any(POSITIONS in k for k in known):
        raise ModelError(
            f"model {name}: {type(model).__name__} can not be compiled for generation; that takes "
            f"a decoder-only model with {POSITIONS}, such as GPT-2 or Llama"
        )


def _require_tied(model: Any, loaded: LoadedModel) -> None:
    from rewriter.builtin_models import builtin_models

    if loaded.name in builtin_models() or getattr(model.config, "tie_word_embeddings", False):
        return
    raise ModelError(
        f"model {loaded.name}: {type(model).__name__} has no head that gives logits; give the "
        "folder of the language model (a ...ForCausalLM or ...LMHeadModel)"
    )


def _read_out(model: Any) -> Any:
    def finish(outputs: Outputs, given: Mapping[str, Tensor]) -> Outputs:
        return {LOGITS: F.linear(outputs[_HIDDEN], model.get_input_embeddings().weight)}

    return finish


@contextmanager
def told_positions(model: nn.Module) -> Iterator[nn.Module]:
    """The model with ``forward(input_ids, position_ids)`` while the context lasts.

    Raises:
        ModelError: its forward takes no position_ids.
    """
    kind = model.__class__
    if is_hugging_face(model):
        plain(model, (TOKENS, POSITIONS), outputs=(LOGITS,))
    elif POSITIONS not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"{type(model).__name__}.forward takes no {POSITIONS}; generating calls it with "
            f"{TOKENS} and {POSITIONS} [batch, tokens], the positions of the tokens from 0"
        )
    try:
        yield model
    finally:
        model.__class__ = kind


def default_length(model: nn.Module) -> int:
    """The longest sequence the model's config speaks of; 2048 where it speaks of none."""
    config = getattr(model, "config", None)
    limit = None if config is None else position_limit(config)
    return limit or 2048


def unseen_window(model: nn.Module, tokens: int) -> int | None:
    """The window of the masks, where an example of `tokens` tokens is not longer than it.

    Such a model looks like a plainly causal one, which for longer sequences it is not.
    """
    config = getattr(model, "config", None)
    for name in ("sliding_window", "window_size"):
        window = getattr(config, name, None)
        if isinstance(window, int) and window >= tokens:
            return window
    return None
