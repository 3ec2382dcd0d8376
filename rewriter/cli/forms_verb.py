"""`rewriter forms`: the forms of attention there are."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from rewriter.cli import options as o
from rewriter.cli.output import console, print_json


def verb(json: o.Json = False) -> None:
    """List the forms: formula, source, what each needs and which masks it carries.

    Example: rewriter forms --json
    """
    rows = form_rows()
    if json:
        print_json({"forms": rows})
        return
    table = Table(title="forms of attention", show_lines=True)
    for column in ("form", "family", "exact", "needs", "carries", "formula", "source", "options"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            row["family"],
            "exact" if row["exact"] else "approximate",
            row["needs"],
            ", ".join(row["carries"]),
            row["formula"],
            row["paper"],
            ", ".join(f"{k}={v}" for k, v in row["options"].items()),
        )
    console.print(table)


def form_rows() -> list[dict[str, Any]]:
    """One row of plain data per form; what it carries is asked of `applies` itself."""
    from passes.form import forms

    rows = []
    for name, cls in forms().items():
        form = cls()
        paper = cls.paper
        rows.append(
            {
                "name": name,
                "family": cls.family,
                "exact": cls.exact,
                "trainable": cls.trainable,
                "needs": cls.needs,
                "carries": _carries(form),
                "formula": cls.formula,
                "paper": f"{paper.authors} {paper.year}, {paper.title}",
                "link": paper.link,
                "options": {f.name: f.default for f in dataclasses.fields(cls.Config)},
            }
        )
    return rows


def _carries(form: Any) -> list[str]:
    from passes.site import AttentionSite, Dims, Mask

    plain = Mask()
    trials = {
        "bidirectional": (plain, False, 4),
        "causal": (Mask(causal=True), False, 4),
        "padding": (Mask(padding=True), False, 4),
        "causal+padding": (Mask(causal=True, padding=True), False, 4),
        "window": (Mask(window=(8, 8)), False, 4),
        "bias": (Mask(bias=True), False, 4),
        "cross": (plain, True, 4),
        "GQA": (plain, False, 2),
    }
    carried = []
    for word, (mask, cross, groups) in trials.items():
        dims = Dims(1, 4, groups, 64, 96 if cross else 64, 32, 32)
        if form.applies(AttentionSite("trial#0", "trial", dims, "float32", 32**-0.5, mask, cross)):
            carried.append(word)
    return carried
