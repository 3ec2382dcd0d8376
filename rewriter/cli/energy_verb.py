"""`rewriter energy`: operations and energy of a whole model, before and after a rewrite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli import options as o
from rewriter.cli.output import console, print_json

Rule = Annotated[
    str, typer.Option("--model", help="Energy model: count, eyeriss or eyeriss-released.")
]
Page = Annotated[Path | None, typer.Option("--html", help="Also write a page with pictures.")]
Png = Annotated[Path | None, typer.Option("--png", help="Also write the picture as a PNG.")]


def verb(
    model: o.Model,
    form: o.Form = None,
    plan: o.PlanFile = None,
    rule: o.Rules = None,
    setting: o.Config = None,
    linear: o.Linear = None,
    energy_model: Rule = "count",
    batch: o.Batch = 1,
    tokens: o.Tokens = None,
    image: o.Image = None,
    attn: o.Attn = "sdpa",
    html: Page = None,
    png: Png = None,
    json: o.Json = False,
) -> None:
    """Count the operations of MODEL by layer and price them; nothing is fitted or run.

    Example: rewriter energy pvt_v2_b0 --form hamming --linear shift
    """
    from rewriter.cli.work import energy_of
    from rewriter.energy_view import chart_png, page, table
    from rewriter.outputs import check_file, write_text

    check_file(html, "--html")
    check_file(png, "--png")
    loaded = o.open_model(model, tokens, batch, image, attn)
    report = energy_of(loaded, form, plan, rule, setting, energy_model, linear)
    if html is not None:
        write_text(html, page(report))
    if png is not None:
        chart_png(report, png)
    if json:
        print_json(report.to_json())
        return
    console.print(table(report))
    for line in (*report.notes, report.summary()):
        console.print(line, markup=False)
