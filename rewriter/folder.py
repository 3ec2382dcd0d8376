"""A rewritten model on disk: plan.json, weights.safetensors, report.json, report.html, meta.json.

The weights file holds only what differs from the original model (parameters of the forms, refitted
projections, distilled layers), so the folder is applied to the original, checked by a hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import ArtifactError, PlanError, RewriterError
from passes.plan import Plan
from rewriter.outputs import check_folder

if TYPE_CHECKING:
    import torch

    from rewriter.api import Inputs, Result

SCHEMA = 1
FILES = ("plan.json", "weights.safetensors", "report.json", "report.html", "meta.json")


def save_rewritten(result: Result, folder: Path) -> None:
    """Write `result` to `folder` (beside, then rename); an older one there is replaced.

    Raises:
        ArtifactError: the folder is not writable, or holds something else.
    """
    from safetensors.torch import save

    check_folder(folder, FILES)
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    try:
        part.mkdir()
        result.plan.save(part / "plan.json")
        (part / "weights.safetensors").write_bytes(save(_changed(result)))
        result.report.save(part / "report.json")
        result.report.save_html(part / "report.html")
        meta = {"schema": SCHEMA, "model": result.name, "base": base_hash(result.traced.module)}
        (part / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
    except (OSError, RewriterError) as error:
        why = error.__cause__ if isinstance(error, RewriterError) else error
        told = getattr(why, "strerror", None) or error
        raise ArtifactError(f"output {folder}: can not be written ({told})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_rewritten(model: Any, example_inputs: Inputs, folder: Path, **options: Any) -> Result:
    """The `Result` saved in `folder`, on the original model it was made from.

    Raises:
        PlanError: the folder is damaged, or belongs to another model.
        UsageError: its report is damaged.
    """
    from rewriter.api import rewrite
    from rewriter.report import RewriteReport

    meta = _read_meta(folder)
    plan = Plan.load(folder / "plan.json")
    result = rewrite(model, example_inputs, plan=plan, on_noop="ok", **options)
    if meta.get("base") != base_hash(result.traced.module):
        raise PlanError(
            f"--from {folder}: was made from other weights than this model's; "
            "name the model it was made from"
        )
    _apply(result.model, folder / "weights.safetensors")
    saved = RewriteReport.load(folder / "report.json")
    result.report = replace(result.report, fit=saved.fit, experts=saved.experts)
    return result


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise PlanError(
            f"--from {folder}: not a folder written by `rewriter fit` or `rewriter rewrite`"
        ) from error
    if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
        raise PlanError(f"--from {folder}: written by another version (schema is not {SCHEMA})")
    return meta


def _apply(module: torch.nn.Module, path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except Exception as error:
        raise PlanError(f"--from {path}: damaged ({error})") from error
    own = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise PlanError(f"--from {path}: tensor {name!r} does not fit this model")
        if not torch.isfinite(tensor).all():
            raise PlanError(f"--from {path}: tensor {name!r} has values that are not finite")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _changed(result: Result) -> dict[str, torch.Tensor]:
    base = result.traced.module.state_dict()
    changed: dict[str, torch.Tensor] = {}
    for name, value in result.model.state_dict().items():
        old = base.get(name)
        if old is None or not bool((old == value).all()):
            changed[name] = value.detach().clone().contiguous()
    return changed


def base_hash(module: torch.nn.Module) -> str:
    """sha256 over the names, shapes, dtypes and bytes of the module's parameters."""
    digest = hashlib.sha256()
    state: Mapping[str, torch.Tensor] = dict(module.named_parameters())
    for name in sorted(state):
        value = state[name].detach().contiguous().cpu()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.flatten().view(_bytes()).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def _bytes() -> torch.dtype:
    import torch

    return torch.uint8
