"""`rewriter bench`: an artifact or a model against the other engines, taking turns."""

from __future__ import annotations

from typing import Annotated

import typer

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
    json: o.Json = False,
) -> None:
    """Time an artifact (or MODEL, compiled exactly) against peers: median, spread, ratio, error.

    Example: rewriter bench minilm.rwa --against eager,inductor,onnxruntime,openvino
    """
    from rewriter.bench import bench
    from rewriter.cli.work import progress_bar

    names = None if against == "all" else [n.strip() for n in against.split(",") if n.strip()]
    options = (
        {}
        if subject.endswith(".rwa")
        else {"tokens": tokens, "batch": batch, "image": image, "attn": attn}
    )
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
