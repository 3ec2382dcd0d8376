"""PyTorch as it is: the model called in inference mode. The reference of every comparison."""

from __future__ import annotations

from rewriter.engines import Array, Call, Engine, Job, load_module


def prepare(job: Job) -> Call:
    """The original model in eager mode."""
    import torch

    from rewriter.verify import flat_tensors, to_numpy

    module, tensors = load_module(job)

    def call() -> list[Array]:
        with torch.inference_mode():
            return [to_numpy(t) for t in flat_tensors(module(**tensors))]

    return call


ENGINES = (Engine("eager", "PyTorch eager", prepare, needs=("torch",)),)
