"""`rewriter demo`: the whole line on a real sentence encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli import options as o
from rewriter.cli.output import console

Json = Annotated[Path | None, typer.Option("--json", help="Also write everything as JSON here.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for what the demo makes.")]
Seconds = Annotated[float, typer.Option("--fit", help="Seconds of fitting.", min=1.0)]


def verb(
    json: Json = None,
    output: Output = Path("out/demo"),
    form: Annotated[str, typer.Option("--form", help="Form for every attention.")] = "hedgehog",
    tokens: Annotated[int, typer.Option(help="Tokens the compiled model takes.")] = 512,
    fit: Seconds = 170.0,
    threads: o.Threads = None,
) -> None:
    """Rewrite, fit, compile, verify and time MiniLM on real sentences; write a page about it.

    Takes under six minutes on two cores. Example: rewriter demo --json demo.json
    """
    import json as json_module

    from rewriter.cli.output import finite
    from rewriter.cli.work import progress_bar
    from rewriter.demo import demo
    from rewriter.outputs import check_file, write_text

    check_file(json, "--json")
    made = demo(
        output, form=form, tokens=tokens, fit_seconds=fit, threads=threads, bars=progress_bar
    )
    if json is not None:
        text = json_module.dumps(finite(made.to_json()), indent=2, default=str)
        write_text(json, text + "\n")
    console.print(made.report.table())
    console.print(made.exact.table())
    console.print(made.report.summary(), markup=False)
    console.print(f"the page: {made.files['page']}", markup=False)
