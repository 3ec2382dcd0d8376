"""Families that were tried after the matcher was written, so that it is held to new spellings."""

from __future__ import annotations

from itertools import chain

import torch

from rewriter.plain import plain
from tests.zoo.entry import Entry, Made, sites
from tests.zoo.text import (
    _BERT,
    _DIMS,
    _GROUPED,
    _LLAMA,
    MASKED,
    B,
    D,
    H,
    T,
    U,
    V,
    build,
    ids,
    masked,
    padding,
)

RESIZE = {"batch": 3, "seq": 9}
_BART = {
    "vocab_size": V, "d_model": H * D, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": H, "decoder_attention_heads": H, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 40,
}  # fmt: skip
_OPT = {
    "vocab_size": V, "hidden_size": H * D, "num_hidden_layers": 2, "num_attention_heads": H,
    "ffn_dim": 48, "max_position_embeddings": 40, "word_embed_proj_dim": H * D,
}  # fmt: skip
_BLOOM = {"vocab_size": V, "hidden_size": H * D, "n_layer": 2, "n_head": H}
_FALCON = {
    "vocab_size": V, "hidden_size": H * D, "num_hidden_layers": 2, "num_attention_heads": H,
}  # fmt: skip
_MODERN = {**_BERT, "local_attention": 8} | dict.fromkeys(
    ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0
)
_VISION = {
    "hidden_size": H * D, "num_hidden_layers": 2, "num_attention_heads": H,
    "intermediate_size": 48, "image_size": 32, "patch_size": 8,
}  # fmt: skip
_SOUND = {
    "hidden_size": H * D, "num_hidden_layers": 2, "num_attention_heads": H,
    "intermediate_size": 48, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_SELF = "encoder.layer.{i}.attention.self"
_DECODER = "layers.{i}.self_attn"


def bart(attn: str) -> Made:
    inputs = {"input_ids": ids(), "attention_mask": padding(), "decoder_input_ids": ids(B, U)}
    model = build("BartModel", _BART, attn)
    return plain(model, tuple(inputs), outputs=("last_hidden_state",)), inputs


def _bart_sites():
    encoder = sites("encoder." + _DECODER, 2, "padding", _DIMS)
    own = sites("decoder." + _DECODER, 2, "causal", (B, H, H, U, U, D))
    cross = sites("decoder.layers.{i}.encoder_attn", 2, "padding", (B, H, H, U, T, D), cross=True)
    return (*encoder, *chain.from_iterable(zip(own, cross, strict=True)))


def one(cls: str, config: dict, name: str, value: torch.Tensor):
    def make(attn: str) -> Made:
        model = build(cls, config, attn)
        return plain(model, (name,), outputs=("last_hidden_state",)), {name: value}

    return make


def _albert_sites():
    # One block for both layers: the second call of the same module is a site of its own.
    path = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    first = sites(path, 1, "padding", _DIMS)[0]
    return (first, type(first)(f"{path}#1", first.mask, first.dims))


_PATCHES = (B, H, H, 17, 17, D)
_IMAGE = torch.rand(B, 3, 32, 32, generator=torch.Generator().manual_seed(0))
_WAVE = torch.randn(B, 600, generator=torch.Generator().manual_seed(0))
EAGER = ("eager",)

ENTRIES = (
    Entry(
        "ALBERT (shared layers)",
        lambda attn: masked("AlbertModel", {**_BERT, "embedding_size": 16}, attn), _albert_sites(),
    ),
    Entry(
        "ELECTRA",
        lambda attn: masked("ElectraModel", {**_BERT, "embedding_size": 16}, attn),
        sites(_SELF, 2, "padding", _DIMS),
    ),
    Entry(
        "MPNet (relative positions)", lambda attn: masked("MPNetModel", _BERT, attn),
        sites("encoder.layer.{i}.attention.attn", 2, "bias", _DIMS), attn=EAGER,
    ),
    Entry(
        "ModernBERT (global and windows of 4)",
        lambda attn: masked("ModernBertModel", _MODERN, attn),
        (
            *sites("layers.{i}.attn", 1, "padding", _DIMS),
            *sites("layers.{i}.attn", 2, "padding+window", _DIMS, window=(4, 4))[1:],
        ),
    ),
    Entry("BART", bart, _bart_sites()),
    Entry(
        "OPT", lambda attn: masked("OPTModel", _OPT, attn),
        sites("decoder." + _DECODER, 2, "causal+padding", _DIMS), dynamic=MASKED, resize=RESIZE,
    ),
    Entry(
        "Qwen2", lambda attn: masked("Qwen2Model", _LLAMA, attn),
        sites(_DECODER, 2, "causal+padding", _GROUPED), dynamic=MASKED, resize=RESIZE,
    ),
    Entry(
        "Phi-3 (one projection of q, k, v)",
        lambda attn: masked("Phi3Model", {**_LLAMA, "pad_token_id": 0}, attn),
        sites(_DECODER, 2, "causal+padding", _GROUPED), dynamic=MASKED, resize=RESIZE,
    ),
    Entry(
        "Gemma 2 (logits through tanh)",
        lambda attn: masked("Gemma2Model", {**_LLAMA, "head_dim": D}, attn), (), attn=EAGER,
        near_misses=("tanh", "tanh"),
    ),
    Entry(
        "GPT-NeoX", lambda attn: masked("GPTNeoXModel", _BERT, attn),
        sites("layers.{i}.attention", 2, "causal+padding", _DIMS),
    ),
    Entry(
        "BLOOM (ALiBi)", lambda attn: masked("BloomModel", _BLOOM, attn),
        sites("h.{i}.self_attention", 2, "bias", _DIMS), attn=EAGER,
    ),
    Entry(
        "Falcon (one key head)", lambda attn: masked("FalconModel", _FALCON, attn),
        sites("h.{i}.self_attention", 2, "causal+padding", (B, H, 1, T, T, D)),
    ),
    Entry(
        "DINOv2", one("Dinov2Model", _VISION, "pixel_values", _IMAGE),
        sites("encoder.layer.{i}.attention", 2, "none", _PATCHES),
    ),
    Entry(
        "BEiT", one("BeitModel", _VISION, "pixel_values", _IMAGE),
        sites("layers.{i}.attention", 2, "none", _PATCHES),
    ),
    Entry(
        "Wav2Vec2", one("Wav2Vec2Model", _SOUND, "input_values", _WAVE),
        sites("encoder.layers.{i}.attention", 2, "none", (B, H, H, 59, 59, D)),
    ),
)  # fmt: skip
