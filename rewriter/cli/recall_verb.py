"""`rewriter recall`: what the state of each form can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from passes.errors import UsageError
from rewriter.cli import options as o
from rewriter.cli.output import console, print_json

Forms = Annotated[str, typer.Option("--forms", help="Forms by commas, or all.")]
Pairs = Annotated[str, typer.Option("--pairs", help="Numbers of pairs, by commas.")]
Record = Annotated[
    Path | None, typer.Option("--record", help="JSON kept after every model; gone on from.")
]
Picture = Annotated[Path | None, typer.Option("--picture", help="Draw the accuracies (.png).")]


def verb(
    forms: Forms = "all",
    pairs: Pairs = "8,32,64,128",
    steps: Annotated[int, typer.Option(help="Training steps of each model.", min=1)] = 400,
    record: Record = None,
    picture: Picture = None,
    json: o.Json = False,
) -> None:
    """Train a small causal model with each form on multi-query associative recall and test it.

    Example: rewriter recall --forms exact,elu,hedgehog --pairs 8,32 --picture recall.png
    """
    from passes.form import forms as known
    from rewriter.cli.work import progress_bar
    from rewriter.outputs import check_file
    from rewriter.recall import Setup, recall, to_json
    from rewriter.recall_view import picture as draw
    from rewriter.recall_view import refusals, table

    check_file(record, "--record")
    check_file(picture, "--picture")
    names = list(known()) if forms == "all" else _split("--forms", forms)
    setup = Setup(steps=steps)
    with progress_bar("recall") as progress:
        cells = recall(names, _numbers(pairs), setup=setup, record=record, progress=progress)
    if picture is not None:
        draw(cells, picture)
    if json:
        print_json(to_json(cells, setup))
        return
    console.print(table(cells))
    for why in refusals(cells):
        console.print(why, markup=False)


def _split(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError(f"{option}: names nothing; give names by commas, or all")
    return parts


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in _split("--pairs", text)]
    except ValueError as error:
        raise UsageError(f"--pairs: expected numbers by commas, got {text!r}") from error
