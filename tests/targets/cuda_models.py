"""Tiny models of three families, with random weights, lowered for cuda:sm_90."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

from codegen.frontend import to_relax
from codegen.lower import Lowered, lower
from codegen.target import target_named
from passes.seal import seal
from rewriter import rewrite
from rewriter.api import Result
from rewriter.pipeline import example_inputs
from rewriter.verify import flat_tensors

TARGET = target_named("cuda:sm_90")
MODELS = ("bert", "vit", "gpt2")
FORMS = ("exact", "elu", "hedgehog")


def _bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=60,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    mask = torch.ones(2, 37, dtype=torch.int64)
    mask[1, 29:] = 0
    inputs = {"input_ids": torch.randint(0, 60, (2, 37)), "attention_mask": mask}
    return BertModel(config, add_pooling_layer=False), inputs


def _vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=80,
        image_size=24,
        patch_size=8,
    )
    return ViTModel(config), {"pixel_values": torch.randn(1, 3, 24, 24)}


def _gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=70, n_positions=128, n_embd=32, n_layer=1, n_head=2, use_cache=False
    )
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 70, (1, 75))}


_MADE = {"bert": _bert, "vit": _vit, "gpt2": _gpt2}


@functools.cache
def rewritten(model: str, form: str) -> Result:
    """The model with every attention in `form`."""
    module, inputs = _MADE[model]()
    return rewrite(module.eval(), inputs, form=form)


@functools.cache
def lowered(model: str, form: str) -> Lowered:
    """The rewritten model scheduled for cuda:sm_90."""
    return lower(to_relax(seal(rewritten(model, form).rewritten), TARGET), TARGET)


def arrays(result: Result) -> tuple[torch.Tensor, ...]:
    """The example inputs in the order of the artifact."""
    inputs = example_inputs(result)
    return tuple(inputs.values()) if isinstance(inputs, dict) else tuple(inputs)


def wanted(result: Result) -> list[np.ndarray]:
    """Outputs of the rewritten model by torch, in the order of the artifact."""
    inputs = example_inputs(result)
    with torch.no_grad():
        made = result.model(**inputs) if isinstance(inputs, dict) else result.model(*inputs)
    return [t.numpy() for t in flat_tensors(made)]
