"""`rewriter tune`: search better schedules in a session that survives a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli import options as o
from rewriter.cli.output import console, print_json

Session = Annotated[
    Path, typer.Option("--session", help="The session's folder; made, or gone on with.")
]
Minutes = Annotated[float, typer.Option("--minutes", help="Time budget of this call.")]


def verb(
    model: o.Model,
    session: Session,
    minutes: Minutes = 10.0,
    form: o.Form = None,
    plan: o.PlanFile = None,
    rule: o.Rules = None,
    setting: o.Config = None,
    source: o.Source = None,
    target: o.Target = "cpu",
    tokens: o.Tokens = None,
    batch: o.Batch = 1,
    image: o.Image = None,
    attn: o.Attn = "sdpa",
    json: o.Json = False,
) -> None:
    """Tune the kernels of a model with MetaSchedule; every winner is checked for correctness.

    Example: rewriter tune minilm --tokens 128 --session tuned/ --minutes 5
    """
    from codegen.target import target_named
    from rewriter.api import tune
    from rewriter.cli.work import any_plan, from_folder, progress_bar, rewrite_model

    made_for = target_named(target)
    loaded = o.open_model(model, tokens, batch, image, attn)
    if source is not None:
        result = from_folder(loaded, source)
    else:
        default = None if any_plan(form, plan, rule) else "exact"
        result = rewrite_model(loaded, form or default, plan, rule, setting, allow_none=False)
    with progress_bar("tune") as progress:
        opened = tune(result, session=session, target=made_for, minutes=minutes, progress=progress)
    if json:
        print_json(opened.to_json())
        return
    console.print(opened.table())
