"""Exported programs (.pt2), loaded only when nothing in them has to be unpickled freely.

torch.export.load unpickles example inputs and pickled weights without limits when the safe
loader refuses them; so every pickled member is tried with the safe loader before.
"""

from __future__ import annotations

import io
import json
import logging
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from passes.errors import ModelError
from passes.trace import trace
from passes.trace_inputs import named_inputs
from rewriter.loaded import LoadedModel


def load_program(path: Path) -> LoadedModel:
    """The exported program in `path`, with the example inputs it carries.

    Raises:
        ModelError: missing, damaged, of another version, without example inputs, or with members
            that only a free unpickling could load.
    """
    if not path.is_file():
        raise ModelError(f"file {path}: does not exist")
    _check_archive(path)
    log = logging.getLogger("torch.export")
    level = log.level
    try:
        log.setLevel(logging.CRITICAL)
        program = torch.export.load(path)
    except Exception as error:
        raise ModelError(
            f"file {path}: torch {torch.__version__} can not load it (made by another version, or "
            f"damaged): {_line(error)}"
        ) from error
    finally:
        log.setLevel(level)
    if not program.example_inputs or not any(program.example_inputs):
        raise ModelError(
            f"file {path}: carries no example inputs; save it with torch.export.save from a "
            "program that still has them, or write a factory"
        )
    module = trace(program, ()).module
    args, kwargs = program.example_inputs
    inputs = {
        k: v
        for k, v in named_inputs(module, tuple(args), kwargs).items()
        if isinstance(v, torch.Tensor)
    }
    return LoadedModel(module, inputs, path.stem, "other", None, f"exported program {path}")


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {_inner(n): n for n in archive.namelist()}
            bad = archive.testzip()
            if bad is not None:
                raise ModelError(f"file {path}: damaged (checksum of {bad}); export it again")
            if "archive_format" not in members or not any(n.startswith("models/") for n in members):
                raise ModelError(
                    f"file {path}: not an exported program of this torch ({torch.__version__}); "
                    "save it again with torch.export.save"
                )
            for inner, name in members.items():
                if _is_pickle(inner, members, archive):
                    _check_pickle(path, inner, archive.read(name))
    except zipfile.BadZipFile:
        raise ModelError(
            f"file {path}: not an exported program, or truncated; export it again"
        ) from None


def _inner(name: str) -> str:
    """The member's path without the archive's own top folder."""
    return str(PurePosixPath(*PurePosixPath(name).parts[1:]))


def _is_pickle(inner: str, members: dict[str, str], archive: zipfile.ZipFile) -> bool:
    if inner.startswith(("data/sample_inputs/", "data/weights/", "data/constants/")):
        if inner.endswith(".pt") or Path(inner).name.startswith(("custom_obj", "opaque_obj")):
            return True
        return Path(inner).name in _pickled_payloads(str(Path(inner).parent), members, archive)
    return False


def _pickled_payloads(folder: str, members: dict[str, str], archive: zipfile.ZipFile) -> set[str]:
    """Names in `folder` that its config says are pickled."""
    found: set[str] = set()
    for inner, name in members.items():
        if inner.startswith(folder) and inner.endswith("config.json"):
            entries: dict[str, Any] = json.loads(archive.read(name)).get("config", {})
            found |= {str(e["path_name"]) for e in entries.values() if e.get("use_pickle")}
    return found


def _check_pickle(path: Path, inner: str, data: bytes) -> None:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise ModelError(
            f"file {path}: its member {inner} is pickled with more than tensors in it, and is not "
            "unpickled here, since that can run code"
        ) from error


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
