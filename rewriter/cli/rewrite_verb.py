"""`rewriter rewrite`: substitute attentions, without fitting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli import options as o
from rewriter.cli.output import console, print_json

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder for plan, weights and report.")
]


def verb(
    model: o.Model,
    form: o.Form = None,
    plan: o.PlanFile = None,
    rule: o.Rules = None,
    setting: o.Config = None,
    linear: o.Linear = None,
    output: Output = None,
    tokens: o.Tokens = None,
    batch: o.Batch = 1,
    image: o.Image = None,
    attn: o.Attn = "sdpa",
    allow_none: o.AllowNone = False,
    html: o.Html = None,
    json: o.Json = False,
) -> None:
    """Substitute the attentions of MODEL and report every site; nothing is fitted.

    Example: rewriter rewrite minilm --rule "encoder.layer.[0-2].*=hedgehog" -o rewritten/
    """
    from rewriter.cli.work import rewrite_model
    from rewriter.folder import FILES, save_rewritten
    from rewriter.outputs import check_file, check_folder

    check_folder(output, FILES, "--output")
    check_file(html, "--html")
    loaded = o.open_model(model, tokens, batch, image, attn)
    result = rewrite_model(loaded, form, plan, rule, setting, allow_none=allow_none, linear=linear)
    if output is not None:
        save_rewritten(result, output)
    if html is not None:
        result.report.save_html(html)
    if json:
        print_json(result.report.to_json())
        return
    console.print(result.report.table())
    console.print(result.report.summary(), markup=False)
