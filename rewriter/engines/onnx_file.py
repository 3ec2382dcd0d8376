"""The ONNX file that ONNX Runtime and OpenVINO share; exported once per bench."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from pathlib import Path

from rewriter.engines import Job, load_module


def onnx_file(job: Job) -> Path:
    """Path of the model as ONNX, exported by torch.onnx (dynamo) with the job's shapes.

    Another process exports: the engine's own then holds neither torch nor the original model.

    Raises:
        RuntimeError: the export failed; with its last line.
    """
    path = job.folder / "onnx" / "model.onnx"
    if path.exists():
        return path
    child = multiprocessing.get_context("spawn").Process(target=_export, args=(job, path))
    child.start()
    child.join()
    if not path.exists():
        said = _log(job.folder)
        last = said.read_text().strip().splitlines()[-1:] if said.exists() else []
        why = last[0] if last else f"exit status {child.exitcode}"
        raise RuntimeError(f"torch.onnx.export failed: {why}")
    return path


def _log(folder: Path) -> Path:
    return folder / "onnx-export.log"


def _export(job: Job, path: Path) -> None:
    try:
        _write(job, path)
    except Exception:
        _log(job.folder).write_text(traceback.format_exc())
        raise


def _write(job: Job, path: Path) -> None:
    import torch

    module, tensors = load_module(job)
    part = path.parent.with_name(f"onnx.part-{os.getpid()}")
    part.mkdir(parents=True)
    with torch.no_grad():
        program = torch.onnx.export(module, (), kwargs=tensors, dynamo=True, verbose=False)
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    program.save(part / path.name)
    part.rename(path.parent)
