"""`rewriter run`: run an artifact on arrays from a file."""

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
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Run an artifact: neither torch nor the compiler is loaded.

    Example: rewriter run minilm.rwa --input x.npz -o y.npz
    """
    from rewriter.api import load
    from rewriter.outputs import check_file

    check_file(output, "--output")
    loaded = load(artifact, threads=threads)
    results = loaded.run(read_arrays(input_file))
    write_arrays(output, results)
    shapes = {n: {"shape": list(a.shape), "dtype": str(a.dtype)} for n, a in results.items()}
    if json:
        print_json({"output": str(output), "outputs": shapes})
        return
    for name, spec in shapes.items():
        console.print(f"{name}: {spec['dtype']} {spec['shape']}", markup=False)
