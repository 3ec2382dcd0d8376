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
Rates = Annotated[
    str, typer.Option("--rates", help="Learning rates, by commas; the better one is shown.")
]
Record = Annotated[
    Path | None, typer.Option("--record", help="JSON kept after every form; gone on from.")
]
Picture = Annotated[Path | None, typer.Option("--picture", help="Draw the accuracies (.png).")]


def verb(
    forms: Forms = "all",
    pairs: Pairs = "4,8,16,32,64",
    steps: Annotated[int, typer.Option(help="Training steps of each model.", min=1)] = 600,
    rates: Rates = "0.01,0.005",
    seeds: Annotated[int, typer.Option(help="Models of each form and rate.", min=1)] = 2,
    record: Record = None,
    picture: Picture = None,
    json: o.Json = False,
) -> None:
    """Train a small causal model with each form on multi-query associative recall and test it.

    Every model sees all numbers of pairs by turns. A form is shown at the better of the rates.

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
    numbers = [int(n) for n in _numbers("--pairs", pairs)]
    setup = Setup(steps=steps, rates=tuple(_numbers("--rates", rates)), seeds=seeds)
    with progress_bar("recall") as progress:
        cells = recall(names, numbers, setup=setup, record=record, progress=progress)
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


def _numbers(option: str, text: str) -> list[float]:
    """Numbers by commas; whole ones for pairs."""
    read = int if option == "--pairs" else float
    try:
        return [read(part) for part in _split(option, text)]
    except ValueError as error:
        raise UsageError(f"{option}: expected numbers by commas, got {text!r}") from error
