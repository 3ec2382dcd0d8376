"""Vision, speech and text-image models: ViT, DeiT, Swin, PVTv2, Segformer, CLIP, Whisper, DETR."""

from __future__ import annotations

from itertools import chain

import torch

from rewriter.plain import plain
from tests.zoo.entry import Entry, Made, Site, sites
from tests.zoo.text import B, D, H, V, build, ids, padding

BATCH = {"pixel_values": {0: "batch"}}
RESIZE = {"batch": 3}
SIDE = 32


def image(cls: str, config: dict, attn: str, side: int = SIDE, **options) -> Made:
    model = build(cls, config, attn, **options)
    inputs = {"pixel_values": torch.randn(B, 3, side, side)}
    return plain(model, ("pixel_values",), outputs=("last_hidden_state",)), inputs


_NO_POOLER = {"add_pooling_layer": False}
_VIT = {
    "hidden_size": H * D, "num_hidden_layers": 2, "num_attention_heads": H,
    "intermediate_size": 48, "image_size": SIDE, "patch_size": 8,
}  # fmt: skip
_PATCHES = (SIDE // 8) ** 2

# 64 pixels in patches of 4 are 16 x 16 tokens, then 8 x 8: windows of 4 x 4, shifted in the
# second block of a stage.
_SWIN = {
    "image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip


def _swin_sites() -> tuple[Site, ...]:
    made = []
    for stage, (windows, heads) in enumerate(((16, 2), (4, 4))):
        for block in range(2):
            name = f"encoder.layers.{stage}.blocks.{block}.attention#0"
            made.append(Site(name, "bias", (B * windows, heads, heads, 16, 16, 8, 8)))
    return tuple(made)


# 32 pixels: 8 x 8 tokens in stage one, reduced by 4 to 2 x 2 keys; 4 x 4 tokens in stage two,
# reduced by 2 to 2 x 2 keys. Reduced copies of the queries' own tokens are no cross attention.
_PYRAMID = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 2], "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
}  # fmt: skip


def _pyramid_sites(pattern: str) -> tuple[Site, ...]:
    return (
        Site(pattern.format(s=0) + "#0", "none", (B, 2, 2, 64, 4, 8, 8)),
        Site(pattern.format(s=1) + "#0", "none", (B, 4, 4, 16, 4, 8, 8)),
    )


def clip(attn: str) -> Made:
    text = {
        "vocab_size": V, "hidden_size": H * D, "num_hidden_layers": 2, "num_attention_heads": H,
        "intermediate_size": 48, "max_position_embeddings": 16, "eos_token_id": 2,
    }  # fmt: skip
    config = {"text_config": text, "vision_config": _VIT, "projection_dim": 16}
    inputs = {
        "input_ids": ids(B, 10),
        "pixel_values": torch.randn(B, 3, SIDE, SIDE),
        "attention_mask": padding(B, 10),
    }
    outputs = ("text_embeds", "image_embeds")
    return plain(build("CLIPModel", config, attn), tuple(inputs), outputs=outputs), inputs


def whisper(attn: str) -> Made:
    config = {
        "vocab_size": V, "num_mel_bins": 8, "d_model": H * D, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": H, "decoder_attention_heads": H,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 10,
        "max_target_positions": 16, "pad_token_id": 0, "decoder_start_token_id": 1,
    }  # fmt: skip
    inputs = {"input_features": torch.randn(B, 8, 20), "decoder_input_ids": ids(B, 6)}
    model = build("WhisperModel", config, attn)
    return plain(model, tuple(inputs), outputs=("last_hidden_state",)), inputs


def detr_decoder(attn: str) -> Made:
    from transformers.models.detr.modeling_detr import DetrDecoder

    config = DetrDecoder.config_class(
        d_model=H * D, decoder_layers=2, decoder_attention_heads=H, decoder_ffn_dim=48,
        use_timm_backbone=False, use_pretrained_backbone=False,
    )  # fmt: skip
    config._attn_implementation = attn
    inputs = {
        "inputs_embeds": torch.randn(B, 5, H * D),
        "encoder_hidden_states": torch.randn(B, 16, H * D),
        "encoder_attention_mask": padding(B, 16),
        "spatial_position_embeddings": torch.randn(B, 16, H * D),
        "object_queries_position_embeddings": torch.randn(B, 5, H * D),
    }
    return plain(DetrDecoder(config).eval(), tuple(inputs), outputs=("last_hidden_state",)), inputs


def _decoder_sites(own: str, cross: str, mask: str, cross_mask: str, t: int, s: int):
    first = sites(own, 2, mask, (B, H, H, t, t, D))
    second = sites(cross, 2, cross_mask, (B, H, H, t, s, D), cross=True)
    return tuple(chain.from_iterable(zip(first, second, strict=True)))


ENTRIES = (
    Entry(
        "ViT", lambda attn: image("ViTModel", _VIT, attn, **_NO_POOLER),
        sites("layers.{i}.attention", 2, "none", (B, H, H, _PATCHES + 1, _PATCHES + 1, D)),
        dynamic=BATCH, resize=RESIZE,
    ),
    Entry(
        "DeiT", lambda attn: image("DeiTModel", _VIT, attn, **_NO_POOLER),
        sites("layers.{i}.attention", 2, "none", (B, H, H, _PATCHES + 2, _PATCHES + 2, D)),
        dynamic=BATCH, resize=RESIZE,
    ),
    Entry(
        "Swin", lambda attn: image("SwinModel", _SWIN, attn, 64, **_NO_POOLER), _swin_sites(),
        dynamic=BATCH, resize=RESIZE,
    ),
    Entry(
        "PVTv2", lambda attn: image("PvtV2Model", {**_PYRAMID, "image_size": SIDE}, attn),
        _pyramid_sites("encoder.layers.{s}.blocks.0.attention"), attn=("eager",),
        dynamic=BATCH, resize=RESIZE,
    ),
    Entry(
        "Segformer", lambda attn: image("SegformerModel", _PYRAMID, attn),
        _pyramid_sites("stages.{s}.blocks.0.attention"), dynamic=BATCH, resize=RESIZE,
    ),
    Entry(
        "CLIP, both towers", clip,
        sites("vision_model.encoder.layers.{i}.self_attn", 2, "none",
              (B, H, H, _PATCHES + 1, _PATCHES + 1, D))
        + sites("text_model.encoder.layers.{i}.self_attn", 2, "causal+padding",
                (B, H, H, 10, 10, D)),
        dynamic={"input_ids": {0: "batch", 1: "seq"}, "pixel_values": {0: "batch"},
                 "attention_mask": {0: "batch", 1: "seq"}},
        resize={"batch": 3, "seq": 9},
    ),
    Entry(
        "Whisper encoder and decoder", whisper,
        sites("encoder.layers.{i}.self_attn", 2, "none", (B, H, H, 10, 10, D))
        + _decoder_sites("decoder.layers.{i}.self_attn", "decoder.layers.{i}.encoder_attn",
                         "causal", "none", 6, 10),
        dynamic={"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "seq"}},
        resize={"batch": 3, "seq": 9},
    ),
    Entry(
        "DETR decoder", detr_decoder,
        _decoder_sites("layers.{i}.self_attn", "layers.{i}.encoder_attn", "none", "padding", 5, 16),
        dynamic={
            "inputs_embeds": {0: "batch"}, "object_queries_position_embeddings": {0: "batch"},
            **{k: {0: "batch", 1: "pixels"} for k in (
                "encoder_hidden_states", "encoder_attention_mask", "spatial_position_embeddings")},
        },
        resize={"batch": 3, "pixels": 9},
    ),
)  # fmt: skip
