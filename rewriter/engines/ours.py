"""This project's artifact, run as a user runs it: numpy in, numpy out."""

from __future__ import annotations

from pathlib import Path

from rewriter.engines import Array, Call, Engine, Job


def prepare(job: Job) -> Call:
    """The artifact at the path `job.model`."""
    from codegen.runtime import load

    artifact = load(Path(job.model), threads=job.threads)
    taken = {spec.name for spec in artifact.inputs}
    feeds = {name: array for name, array in job.inputs.items() if name in taken}

    def call() -> list[Array]:
        return list(artifact.run(feeds).values())

    return call


ENGINES = (Engine("ours", "this artifact", prepare),)
