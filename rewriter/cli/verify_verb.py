"""`rewriter verify`: an artifact against the model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli import options as o
from rewriter.cli.output import console, print_json


def verb(
    artifact: Annotated[Path, typer.Argument(metavar="OUT.rwa", help="A compiled artifact.")],
    model: o.Model,
    source: o.Source = None,
    threads: o.Threads = None,
    attn: o.Attn = "sdpa",
    json: o.Json = False,
) -> None:
    """Compare an artifact with its rewritten model (tight) and with the original (fidelity).

    Example: rewriter verify minilm.rwa minilm --from fitted/
    """
    from rewriter.cli.work import verify_file

    outcome = verify_file(artifact, model, source, threads, attn)
    if json:
        print_json(outcome)
    else:
        for line in outcome["lines"]:
            console.print(line, markup=False)
    if not outcome["ok"]:
        raise typer.Exit(1)
