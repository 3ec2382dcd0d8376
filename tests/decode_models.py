"""Tiny language models with lively random weights: their greedy text does not repeat at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 89


def tiny_gpt2(seed: int = 0, **changes: Any) -> nn.Module:
    """GPT-2 of 2 layers, 4 heads of 8, learned positions, a head of its own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {
        "vocab_size": VOCABULARY, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "initializer_range": 0.3, "tie_word_embeddings": False, "bos_token_id": 0,
        "eos_token_id": 0, "attn_implementation": "sdpa", **changes,
    }  # fmt: skip
    return _seeded(seed, lambda: GPT2LMHeadModel(GPT2Config(**settings)))


def tiny_llama(seed: int = 0, **changes: Any) -> nn.Module:
    """Llama of 2 layers, 4 query heads on 2 key heads of 8, rotary positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.3,
        "attn_implementation": "sdpa", **changes,
    }  # fmt: skip
    return _seeded(seed, lambda: LlamaForCausalLM(LlamaConfig(**settings)))


def tiny_mistral(seed: int = 0, **changes: Any) -> nn.Module:
    """As `tiny_llama`, but a token sees 20 keys at most."""
    from transformers import MistralConfig, MistralForCausalLM

    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.3, "sliding_window": 20,
        "attn_implementation": "sdpa", **changes,
    }  # fmt: skip
    return _seeded(seed, lambda: MistralForCausalLM(MistralConfig(**settings)))


MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "mistral": tiny_mistral}


def _seeded(seed: int, make: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = make().eval()
    return model


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A factory for the command line."""
    return tiny_gpt2(), {"input_ids": torch.randint(0, VOCABULARY, (1, 24))}


def follows(
    module: Any, prompt: torch.Tensor, new: Any, room: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(greedy tokens [B, new] of `module` after each token before, their leads over the next).

    One run over prompt [B, n] and new tokens [B, m], filled up with zeros to `room` tokens, which a
    causal model does not see. Equal to `new` means that greedy generation gives `new`.
    """
    ids = torch.zeros(prompt.shape[0], room, dtype=torch.long)
    ids[:, : prompt.shape[1]] = prompt
    made = torch.as_tensor(new)
    first, end = prompt.shape[1], prompt.shape[1] + made.shape[1]
    ids[:, first:end] = made
    with torch.no_grad():
        logits = module(input_ids=ids)["logits"][:, first - 1 : end - 1]
    best = logits.topk(2, -1).values
    return logits.argmax(-1), best[..., 0] - best[..., 1]
