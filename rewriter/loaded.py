"""LoadedModel: a model with example inputs and what is known about it; its example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import ModelError


@dataclass(frozen=True)
class LoadedModel:
    """What MODEL became.

    `kind` is "text", "image", "audio" or "other"; `example_inputs` are by forward's names;
    `tokenizer_path` is the folder of a tokenizer that belongs to the model.
    """

    model: nn.Module
    example_inputs: dict[str, Tensor]
    name: str
    kind: str
    tokenizer_path: Path | None = None
    description: str = ""


@dataclass(frozen=True)
class Options:
    """Sizes of the example inputs, and how a Hugging Face model computes attention."""

    tokens: int | None = None
    batch: int = 1
    image: int | None = None
    attn: str = "sdpa"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "image"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ModelError(f"{name}: must be at least 1, got {value}")
        if self.attn not in ("sdpa", "eager"):
            raise ModelError(f"attn: must be sdpa or eager, got {self.attn!r}")


def text_inputs(
    names: tuple[str, ...], config: Any, options: Options, default: int = 128
) -> dict[str, Tensor]:
    """Random token ids [B, T], with a mask that pads every row but the first if it is asked for."""
    limit = position_limit(config)
    tokens = options.tokens or min(default, limit or default)
    if limit and tokens > limit:
        raise ModelError(f"tokens: the model takes at most {limit}, got {tokens}")
    made: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(options.seed)
    for name in names:
        if name.endswith("attention_mask"):
            made[name] = torch.ones(options.batch, tokens, dtype=torch.long)
            made[name][1:, tokens - tokens // 4 :] = 0
        elif name.endswith("token_type_ids"):
            made[name] = torch.zeros(options.batch, tokens, dtype=torch.long)
        else:
            shape = (options.batch, tokens)
            made[name] = torch.randint(3, config.vocab_size, shape, generator=draw)
    return made


def position_limit(config: Any) -> int | None:
    """The longest sequence a text model takes; None where positions are relative."""
    if getattr(config, "model_type", "") in ("t5", "mt5"):
        return None
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        return limit - config.pad_token_id - 1 if limit else None
    return limit


def image_inputs(config: Any, options: Options) -> dict[str, Tensor]:
    """Random pixels [B, channels, side, side]."""
    size = options.image or getattr(config, "image_size", None) or 224
    side = size if isinstance(size, int) else next(iter(_sides(size)))
    draw = torch.Generator().manual_seed(options.seed)
    channels = getattr(config, "num_channels", 3)
    return {"pixel_values": torch.randn(options.batch, channels, side, side, generator=draw)}


def _sides(size: Any) -> list[int]:
    return list(size.values()) if isinstance(size, Mapping) else list(size)


def audio_inputs(config: Any, options: Options) -> dict[str, Tensor]:
    """Random log-mel features [B, mels, frames], two frames a token."""
    draw = torch.Generator().manual_seed(options.seed)
    shape = (options.batch, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": torch.randn(*shape, generator=draw)}
