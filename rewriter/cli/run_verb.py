"""`rewriter run`: run an artifact on arrays from a file, or generate tokens with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.arrays import read_arrays, write_arrays
from rewriter.cli import options as o
from rewriter.cli.output import console, print_json


def verb(
    artifact: Annotated[Path, typer.Argument(metavar="OUT.rwa", help="A compiled artifact.")],
    input_file: Annotated[
        Path, typer.Option("--input", "-i", help=".npz with one array per input name.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help=".npz to write the outputs to.")],
    generate: Annotated[
        int | None,
        typer.Option("--generate", min=1, help="Tokens to generate after the prompt (input_ids)."),
    ] = None,
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Run an artifact: neither torch nor the compiler is loaded.

    With --generate N an artifact of `rewriter compile --decode` goes on greedily from the prompt
    in --input and writes the array "tokens".

    Example: rewriter run minilm.rwa --input x.npz -o y.npz
    """
    from rewriter.api import load
    from rewriter.cli.decode_work import generate as generate_tokens
    from rewriter.outputs import check_file

    check_file(output, "--output")
    loaded = load(artifact, threads=threads)
    arrays = read_arrays(input_file)
    told: dict[str, float] = {}
    if generate is None:
        results = loaded.run(arrays)
    else:
        made = generate_tokens(loaded, arrays, generate)
        results = {"tokens": made.pop("tokens")}
        told = {name: round(value, 4) for name, value in made.items()}
    write_arrays(output, results)
    shapes = {n: {"shape": list(a.shape), "dtype": str(a.dtype)} for n, a in results.items()}
    if json:
        print_json({"output": str(output), "outputs": shapes, **told})
        return
    for name, spec in shapes.items():
        console.print(f"{name}: {spec['dtype']} {spec['shape']}", markup=False)
    if told:
        console.print(f"{told['tokens_per_second']:.1f} tokens a second, prompt included")
