"""`rewriter models`: the built-in models."""

from __future__ import annotations

from rich.table import Table

from rewriter.cli import options as o
from rewriter.cli.output import console, print_json


def verb(json: o.Json = False) -> None:
    """List the built-in models (no network is needed for any of them).

    Example: rewriter models
    """
    from rewriter.models import describe

    rows = describe()
    if json:
        print_json({"models": rows})
        return
    table = Table(title="built-in models")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(v) for v in row.values()))
    console.print(table)
