"""`rewriter targets`: what code can be made for."""

from __future__ import annotations

from rich.table import Table

from rewriter.cli import options as o
from rewriter.cli.output import console, print_json


def verb(json: o.Json = False) -> None:
    """List the targets code can be compiled for.

    Example: rewriter targets
    """
    from codegen.target import targets

    rows = [t.to_json() for t in targets().values()]
    if json:
        print_json({"targets": rows})
        return
    table = Table(title="targets")
    for column in ("target", "kind", "triple", "vector bytes", "features", "description"):
        table.add_column(column, overflow="fold")
    for row in rows:
        features = " ".join(row["features"])
        width = str(row["vector_bytes"])
        table.add_row(row["name"], row["kind"], row["triple"], width, features, row["description"])
    console.print(table)
