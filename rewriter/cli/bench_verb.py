"""`rewriter bench`: an artifact or a model against the other engines, taking turns."""

from __future__ import annotations

from typing import Annotated

import typer

from passes.errors import UsageError
from rewriter.cli import options as o
from rewriter.cli.output import console, print_json

Subject = Annotated[
    str, typer.Argument(metavar="OUT.rwa|MODEL", help="An artifact, or a model to compile exactly.")
]
Against = Annotated[
    str,
    typer.Option(help="Engines, by commas: eager, inductor, onnxruntime, openvino, ... or all."),
]
Original = Annotated[
    str | None, typer.Option("--model", help="The MODEL the artifact was made from.")
]


def verb(
    subject: Subject,
    against: Against = "eager",
    model: Original = None,
    threads: o.Threads = None,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 7,
    seconds: Annotated[float, typer.Option(help="Timing per engine over all rounds.")] = 4.0,
    tokens: o.Tokens = None,
    batch: o.Batch = 1,
    image: o.Image = None,
    attn: o.Attn = "sdpa",
    profile: Annotated[
        bool, typer.Option("--profile", help="Time the kernels of OUT.rwa instead of engines.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Time an artifact (or MODEL, compiled exactly) against peers: median, spread, ratio, error.

    Example: rewriter bench minilm.rwa --against eager,inductor,onnxruntime,openvino
    """
    if profile:
        _profile(subject, threads, seconds, json)
        return
    from rewriter.bench import bench
    from rewriter.cli.decode_work import refuse_decode
    from rewriter.cli.work import progress_bar

    names = None if against == "all" else [n.strip() for n in against.split(",") if n.strip()]
    if names == []:
        raise UsageError("--against: names no engine; give eager, onnxruntime, ... or all")
    options = (
        {}
        if subject.endswith(".rwa")
        else {"tokens": tokens, "batch": batch, "image": image, "attn": attn}
    )
    if subject.endswith(".rwa"):
        refuse_decode(subject)
    with progress_bar("bench") as progress:
        result = bench(
            subject,
            model=model,
            engines=names,
            threads=threads,
            repeats=repeats,
            seconds=seconds,
            options=options,
            progress=progress,
        )
    if json:
        print_json(result.to_json())
        return
    console.print(result.table())


def _profile(subject: str, threads: int | None, seconds: float, json: bool) -> None:
    """Kernels by time, on random inputs; needs no torch."""
    from pathlib import Path

    from codegen.profile import profile
    from codegen.runtime import load
    from rewriter.bench import random_inputs
    from rewriter.terminal import profile_view

    if not subject.endswith(".rwa"):
        raise UsageError(f"--profile: {subject} is not an artifact; compile it first (-o OUT.rwa)")
    with load(Path(subject), threads=threads) as artifact:
        result = profile(artifact, random_inputs(artifact.inputs), seconds)
    if json:
        print_json(result.to_json())
        return
    console.print(profile_view(result))
