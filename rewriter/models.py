"""MODEL -> a module with example inputs.

MODEL is a built-in name, a local Hugging Face folder, a hub id, an exported program (.pt2) or
``package.module:factory``.
"""

from __future__ import annotations

import re
from pathlib import Path

from passes.errors import ModelError, UnknownName
from rewriter.builtin_models import builtin_models, describe, load_builtin
from rewriter.loaded import LoadedModel, Options

__all__ = ["LoadedModel", "Options", "builtin_models", "describe", "load_model"]

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def load_model(
    spec: str,
    *,
    tokens: int | None = None,
    batch: int = 1,
    image: int | None = None,
    attn: str = "sdpa",
    seed: int = 0,
) -> LoadedModel:
    """Turn MODEL into an evaluating module with example inputs by name.

    Args:
        spec: MODEL.
        tokens, batch, image: sizes of the example inputs, where the model leaves them open (a
            factory and a .pt2 bring their own inputs).
        attn: transformers' attention code, "sdpa" or "eager".
        seed: of random weights and random inputs.

    Raises:
        ModelError: the model can not be had; UnknownName: no such built-in name.
    """
    options = Options(tokens, batch, image, attn, seed)
    path = Path(spec).expanduser()
    if spec in builtin_models():
        return load_builtin(spec, options)
    if path.suffix == ".pt2":
        from rewriter.program_models import load_program

        return load_program(path)
    if path.is_dir():
        from rewriter.hf_models import load_folder

        return load_folder(path, options)
    if path.is_file():
        raise ModelError(_wrong_file(path))
    return _load_by_name(spec, options)


def _load_by_name(spec: str, options: Options) -> LoadedModel:
    if _FACTORY.fullmatch(spec):
        from rewriter.factory_models import load_factory

        return load_factory(spec, options)
    if ":" in spec:
        raise ModelError(f"model {spec!r}: a factory is written package.module:function")
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or spec.endswith("/"):
        raise ModelError(f"model {spec!r}: no such file or folder")
    if _HUB_ID.fullmatch(spec):
        from rewriter.hf_models import load_hub

        return load_hub(spec, options)
    raise UnknownName("model", spec, builtin_models())


def _wrong_file(path: Path) -> str:
    if path.suffix in _PICKLED:
        return (
            f"file {path}: pickled files are not loaded, since that can run code; give a Hugging "
            "Face folder with safetensors, a .pt2 (torch.export.save), or a factory"
        )
    return (
        f"file {path}: not a model; give a folder with config.json and model.safetensors, "
        "a .pt2, package.module:factory or a built-in name"
    )
