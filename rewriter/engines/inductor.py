"""torch.compile with its default backend, Inductor, and weights frozen into the code."""

from __future__ import annotations

from typing import Any

from rewriter.engines import Array, Call, Engine, Job, load_module


def prepare(job: Job) -> Call:
    """The original model compiled by Inductor for these shapes."""
    import torch
    import torch._inductor.config as inductor

    from rewriter.verify import flat_tensors, to_numpy

    module, tensors = load_module(job)
    inductor.freezing = True
    compiled: Any = torch.compile(module, dynamic=False)

    def call() -> list[Array]:
        with torch.no_grad():  # freezing needs no_grad; it is not done in inference mode
            return [to_numpy(t) for t in flat_tensors(compiled(**tensors))]

    return call


ENGINES = (Engine("inductor", "torch.compile", prepare, needs=("torch",)),)
