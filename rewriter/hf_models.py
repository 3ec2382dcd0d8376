"""Hugging Face models from a local folder or the hub. Weights come from safetensors only."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from passes.errors import ModelError
from rewriter.loaded import LoadedModel, Options, audio_inputs, image_inputs, text_inputs
from rewriter.plain import Finish, mean_pooling, plain

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def transformers() -> Any:
    """The transformers library.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import transformers as library
    except ImportError:
        raise ModelError(
            "this model needs transformers; pip install attention-rewriter[hf]"
        ) from None
    return library


def load_folder(folder: Path, options: Options, *, name: str | None = None) -> LoadedModel:
    """A model from a folder with config.json and safetensors weights.

    A sentence-transformers folder with mean pooling gives ``sentence_embedding`` as well.

    Raises:
        ModelError: no config.json, no safetensors weights, weights that do not fit the config,
            an architecture that is not in transformers (code in the folder is never run).
    """
    _check_files(folder)
    library = transformers()
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder}/config.json can not be read: {_line(error)}") from error
    finish = _pooling(folder)
    cls = _class(library, config, folder)
    model = _from_pretrained(cls, folder, options, pooled=finish is not None)
    inputs, kind = example_inputs(model, options)
    if "attention_mask" not in inputs:
        finish = None
    model = plain(model.eval(), tuple(inputs), finish=finish)
    tokenizer = (
        folder if any(folder.glob("tokenizer*")) or (folder / "vocab.txt").exists() else None
    )
    about = f"{type(model).__name__} from {folder}"
    return LoadedModel(model, inputs, name or folder.name, kind, tokenizer, about)


def load_hub(spec: str, options: Options) -> LoadedModel:
    """A model from the Hugging Face hub or its local cache.

    Raises:
        ModelError: no such model, no network and not in the cache, or no safetensors weights.
    """
    transformers()
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(spec, allow_patterns=_HUB_FILES, etag_timeout=10)
    except Exception as error:
        raise ModelError(
            f"model {spec!r}: not a local folder, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {_line(error)}); check the name and the network, or give "
            "a local folder or a built-in name (rewriter models)"
        ) from error
    return load_folder(Path(folder), options, name=spec)


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"folder {folder}: no model in it (config.json is missing); give a Hugging Face "
            "folder with config.json and model.safetensors"
        )
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"folder {folder}: its weights are pickled ({pickles[0]}), and nothing is unpickled "
            "here, since that can run code; convert them where you trust them: "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
    raise ModelError(f"folder {folder}: config.json is there but no *.safetensors weights")


def _class(library: Any, config: Any, folder: Path) -> Any:
    for name in config.architectures or ():
        if hasattr(library, name):
            return getattr(library, name)
    try:
        return library.AutoModel._model_mapping[type(config)]
    except KeyError:
        raise ModelError(
            f"folder {folder}: architecture {config.architectures} is not one of transformers'; "
            "code that comes with a model is not run"
        ) from None


def _from_pretrained(cls: Any, folder: Path, options: Options, *, pooled: bool) -> Any:
    cls = cls[0] if isinstance(cls, tuple) else cls
    extra = {}
    if pooled and "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
        extra["add_pooling_layer"] = False

    with _quiet():
        try:
            model, info = cls.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=attention_code(cls, options),
                output_loading_info=True,
                **extra,
            )
        except Exception as error:
            raise ModelError(f"folder {folder}: {type(error).__name__}: {_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"folder {folder}: the weights lack {len(missing)} tensors that {cls.__name__} needs "
            f"(first: {missing[0]}); the folder's architecture and weights do not belong together"
        )
    return model


def attention_code(cls: Any, options: Options) -> str:
    """The attention code asked for, or eager where an architecture has only that."""
    return options.attn if getattr(cls, "_supports_sdpa", False) else "eager"


def example_inputs(model: Any, options: Options) -> tuple[dict[str, torch.Tensor], str]:
    """Example inputs of a Hugging Face model, and its kind."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    text = getattr(config, "text_config", config)
    main = model.main_input_name
    made: dict[str, torch.Tensor] = {}
    kind = {"pixel_values": "image", "input_features": "audio"}.get(main, "text")
    if main == "input_ids":
        made |= text_inputs(("input_ids", "attention_mask"), text, options)
    if "pixel_values" in takes:
        made |= image_inputs(getattr(config, "vision_config", config), options)
    if main == "input_features":
        made |= audio_inputs(config, options)
    if "decoder_input_ids" in takes and config.is_encoder_decoder:
        made |= text_inputs(("decoder_input_ids",), config, options, default=16)
    if not made:
        raise ModelError(
            f"{type(model).__name__}: no example inputs are known for its input {main!r}; write a "
            "factory that returns the model and its inputs (package.module:factory)"
        )
    return made, kind


def _pooling(folder: Path) -> Finish | None:
    try:
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
        modules = (folder / "modules.json").read_text()
    except (OSError, ValueError):
        return None
    return mean_pooling("Normalize" in modules) if pooling.get("pooling_mode_mean_tokens") else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no load report; what matters becomes an error."""
    from transformers.utils import logging as hf_logging

    logger = logging.getLogger("transformers")
    level, bars = logger.level, hf_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
