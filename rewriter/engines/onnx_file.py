"""The ONNX file that ONNX Runtime and OpenVINO share; exported once per bench."""

from __future__ import annotations

import os
from pathlib import Path

from rewriter.engines import Job, load_module


def onnx_file(job: Job) -> Path:
    """Path of the model as ONNX, exported by torch.onnx (dynamo) with the job's shapes."""
    path = job.folder / "onnx" / "model.onnx"
    if path.exists():
        return path
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
    return path
