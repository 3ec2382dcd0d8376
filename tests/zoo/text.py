"""Text models: BERT's family, GPT-2, Llama, Mistral, T5."""

from __future__ import annotations

from itertools import chain

import torch
import transformers as hf

from rewriter.plain import plain
from tests.zoo.entry import Entry, Made, sites

B, T, H, D, V = 2, 12, 4, 8, 60
SEQ = {0: "batch", 1: "seq"}
IDS = {"input_ids": SEQ}
MASKED = {"input_ids": SEQ, "attention_mask": SEQ}
RESIZE = {"batch": 3, "seq": 9}


def ids(batch: int = B, tokens: int = T) -> torch.Tensor:
    return torch.randint(3, V, (batch, tokens))


def padding(batch: int = B, tokens: int = T) -> torch.Tensor:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[1:, tokens - 3 :] = 0
    return mask


def build(cls: str, config: dict, attn: str, *, train: bool = False, **options) -> torch.nn.Module:
    kind = getattr(hf, cls)
    settings = kind.config_class(**config)
    settings._attn_implementation = attn
    return kind(settings, **options).train(train)


def masked(cls: str, config: dict, attn: str, **options) -> Made:
    model = build(cls, config, attn, **options)
    inputs = {"input_ids": ids(), "attention_mask": padding()}
    return plain(model, tuple(inputs), outputs=("last_hidden_state",)), inputs


def unmasked(cls: str, config: dict, attn: str, **options) -> Made:
    model = build(cls, config, attn, **options)
    return plain(model, ("input_ids",), outputs=("last_hidden_state",)), {"input_ids": ids()}


_BERT = {
    "vocab_size": V, "hidden_size": H * D, "num_hidden_layers": 2, "num_attention_heads": H,
    "intermediate_size": 48, "max_position_embeddings": 40,
}  # fmt: skip
_DISTIL = {
    "vocab_size": V, "dim": H * D, "n_layers": 2, "n_heads": H, "hidden_dim": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
_GPT2 = {"vocab_size": V, "n_embd": H * D, "n_layer": 2, "n_head": H, "n_positions": 40}
_LLAMA = {**_BERT, "num_key_value_heads": 2}
_T5 = {
    "vocab_size": V, "d_model": 32, "d_kv": D, "d_ff": 48, "num_layers": 2, "num_heads": H,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
}  # fmt: skip
_NO_POOLER = {"add_pooling_layer": False}
_DIMS = (B, H, H, T, T, D)
_GROUPED = (B, H, 2, T, T, D)
U = 7  # decoder tokens


def t5(attn: str) -> Made:
    inputs = {"input_ids": ids(), "attention_mask": padding(), "decoder_input_ids": ids(B, U)}
    model = build("T5Model", _T5, attn)
    return plain(model, tuple(inputs), outputs=("last_hidden_state",)), inputs


def _t5_sites():
    # T5 does not scale, and adds its position bias to the mask: a general bias. The cross
    # attention's bias is zero, which leaves the padding.
    encoder = sites(
        "encoder.block.{i}.layer.0.SelfAttention", 2, "bias", (B, H, H, T, T, D), scale=1.0
    )
    own = sites("decoder.block.{i}.layer.0.SelfAttention", 2, "bias", (B, H, H, U, U, D), scale=1.0)
    cross = sites(
        "decoder.block.{i}.layer.1.EncDecAttention", 2, "padding", (B, H, H, U, T, D),
        cross=True, scale=1.0,
    )  # fmt: skip
    return (*encoder, *chain.from_iterable(zip(own, cross, strict=True)))


ENTRIES = (
    Entry(
        "BERT", lambda attn: masked("BertModel", _BERT, attn, **_NO_POOLER),
        sites("encoder.layer.{i}.attention.self", 2, "padding", _DIMS), dynamic=MASKED,
        resize=RESIZE,
    ),
    Entry(
        "BERT without a mask", lambda attn: unmasked("BertModel", _BERT, attn, **_NO_POOLER),
        sites("encoder.layer.{i}.attention.self", 2, "none", _DIMS), dynamic=IDS, resize=RESIZE,
    ),
    Entry(
        "BERT in train mode",
        lambda attn: masked("BertModel", _BERT, attn, train=True, **_NO_POOLER),
        sites("encoder.layer.{i}.attention.self", 2, "padding", _DIMS, dropout=0.1), exact=False,
    ),
    Entry(
        "DistilBERT", lambda attn: masked("DistilBertModel", _DISTIL, attn),
        sites("transformer.layer.{i}.attention", 2, "padding", _DIMS), dynamic=MASKED,
        resize=RESIZE,
    ),
    Entry(
        "RoBERTa", lambda attn: masked("RobertaModel", _BERT, attn, **_NO_POOLER),
        sites("encoder.layer.{i}.attention.self", 2, "padding", _DIMS), dynamic=MASKED,
        resize=RESIZE,
    ),
    Entry(
        "GPT-2", lambda attn: unmasked("GPT2Model", _GPT2, attn),
        sites("h.{i}.attn", 2, "causal", _DIMS), dynamic=IDS, resize=RESIZE,
    ),
    Entry(
        "GPT-2 with padding", lambda attn: masked("GPT2Model", _GPT2, attn),
        sites("h.{i}.attn", 2, "causal+padding", _DIMS), dynamic=MASKED, resize=RESIZE,
    ),
    Entry(
        "Llama (GQA, RoPE)", lambda attn: unmasked("LlamaModel", _LLAMA, attn),
        sites("layers.{i}.self_attn", 2, "causal", _GROUPED), dynamic=IDS, resize=RESIZE,
    ),
    Entry(
        "Llama with padding", lambda attn: masked("LlamaModel", _LLAMA, attn),
        sites("layers.{i}.self_attn", 2, "causal+padding", _GROUPED), dynamic=MASKED,
        resize=RESIZE,
    ),
    Entry(
        "Mistral (sliding window of 4)",
        lambda attn: unmasked("MistralModel", {**_LLAMA, "sliding_window": 4}, attn),
        sites("layers.{i}.self_attn", 2, "causal+window", _GROUPED, window=(3, 0)), dynamic=IDS,
        resize=RESIZE,
    ),
    Entry(
        "T5 encoder", lambda attn: masked("T5EncoderModel", _T5, attn),
        _t5_sites()[:2], dynamic=MASKED, resize=RESIZE,
    ),
    Entry(
        "T5 encoder and decoder", t5, _t5_sites(),
        dynamic={**MASKED, "decoder_input_ids": {0: "batch", 1: "out"}},
        resize={**RESIZE, "out": 5},
    ),
)  # fmt: skip
