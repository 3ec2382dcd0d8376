"""`rewriter sites`: every attention of a model, and every near miss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from rewriter.cli import options as o
from rewriter.cli.output import console, print_json

if TYPE_CHECKING:
    from passes.find import Found


def verb(
    model: o.Model,
    tokens: o.Tokens = None,
    batch: o.Batch = 1,
    image: o.Image = None,
    attn: o.Attn = "sdpa",
    json: o.Json = False,
) -> None:
    """List the attention sites of MODEL and the near misses, each with file and line.

    Example: rewriter sites minilm --json
    """
    from rewriter.api import find_sites

    loaded = o.open_model(model, tokens, batch, image, attn)
    traced, found = find_sites(loaded.model, loaded.example_inputs)
    if json:
        print_json(
            {
                "model": loaded.name,
                "tracer": traced.tracer,
                "notes": list(traced.notes),
                "sites": [{**s.to_json(), "status": "FOUND"} for s in found.sites],
                "near_misses": [m.to_json() for m in found.near_misses],
            }
        )
        return
    _show(loaded.name, found)


def _show(name: str, found: Found) -> None:
    table = Table(title=f"{name}: {len(found.sites)} attention sites")
    for column in ("site", "B H/G T S D", "mask", "cross", "found by", "source"):
        table.add_column(column, overflow="fold")
    for s in found.sites:
        d = s.dims
        dims = f"{d.B} {d.H}/{d.G} {d.T} {d.S} {d.D}"
        cross = "yes" if s.cross else ""
        table.add_row(s.id, dims, s.mask.kind, cross, s.found_by, s.source)
    console.print(table)
    for miss in found.near_misses:
        console.print(
            f"near miss: {miss.module_path} {miss.source}: {miss.reason} (node {miss.node})",
            markup=False,
        )
