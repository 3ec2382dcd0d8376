"""`rewriter doctor`: what this installation is, and what is wrong with it."""

from __future__ import annotations

from rewriter.cli import options as o
from rewriter.cli.output import console, print_json


def verb(json: o.Json = False) -> None:
    """Check versions, compilers, processor features and where the packages come from.

    Example: rewriter doctor
    """
    from rewriter.doctor import diagnose, render

    report = diagnose()
    if json:
        print_json(report)
        return
    console.print(render(report))
