"""`rewriter report`: show a saved report again, as a table, JSON or a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli import options as o
from rewriter.cli.output import console, print_json

Subject = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="An artifact, a report.json, or a rewritten folder."),
]


Pictures = Annotated[
    Path | None,
    typer.Option("--pictures", help="Folder for PNGs of two-expert layers (--linear moe)."),
]


def verb(
    subject: Subject, html: o.Html = None, pictures: Pictures = None, json: o.Json = False
) -> None:
    """Show the report inside an artifact (no code of it is loaded), a folder or a JSON file.

    Example: rewriter report minilm.rwa --html minilm.html
    """
    from rewriter.cli.work import read_report
    from rewriter.outputs import check_file

    check_file(html, "--html")
    report = read_report(subject)
    if html is not None:
        report.save_html(html)
    if pictures is not None:
        from rewriter.moe_plots import save_pictures

        save_pictures(report, pictures)
    if json:
        print_json(report.to_json())
        return
    console.print(report.table())
    console.print(report.summary(), markup=False)
