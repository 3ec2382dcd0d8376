"""`rewriter run`: run an artifact on arrays from a file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from passes.errors import ArtifactError, InputError
from rewriter.cli import options as o
from rewriter.cli.output import console, print_json

if TYPE_CHECKING:
    import numpy as np


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

    loaded = load(artifact, threads=threads)
    results = loaded.run(read_arrays(input_file))
    write_arrays(output, results)
    shapes = {n: {"shape": list(a.shape), "dtype": str(a.dtype)} for n, a in results.items()}
    if json:
        print_json({"output": str(output), "outputs": shapes})
        return
    for name, spec in shapes.items():
        console.print(f"{name}: {spec['dtype']} {spec['shape']}", markup=False)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; nothing is unpickled."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise InputError(f"input {path}: there is no such file") from error
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(
            f"input {path}: not an .npz of plain arrays ({error}); write one with numpy.savez"
        ) from error


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz beside, then rename."""
    import numpy as np

    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ArtifactError(f"output {path}: can not be written ({error.strerror})") from error
