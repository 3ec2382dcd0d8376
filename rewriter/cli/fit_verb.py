"""`rewriter fit`: substitute, then fit what was put in to what was taken out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewriter.cli import options as o
from rewriter.cli.output import console, print_json

Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for plan, weights and report.")
]
Seconds = Annotated[float, typer.Option("--seconds", help="Time budget of the fit.")]
State = Annotated[
    Path | None, typer.Option("--state", help="Folder a killed fit goes on from (default: -o's).")
]

Loss = Annotated[
    str | None,
    typer.Option(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="Then fine-tune on loss(outputs, batch); labels are further arrays of --data.",
    ),
]
LossSeconds = Annotated[float, typer.Option(help="Time budget of the fine-tuning.")]


def verb(
    model: o.Model,
    output: Output,
    seconds: Seconds = 240.0,
    form: o.Form = None,
    plan: o.PlanFile = None,
    rule: o.Rules = None,
    setting: o.Config = None,
    linear: o.Linear = None,
    data: o.Data = None,
    max_drop: o.MaxDrop = None,
    state: State = None,
    loss: Loss = None,
    loss_seconds: LossSeconds = 120.0,
    tokens: o.Tokens = None,
    batch: o.Batch = 1,
    image: o.Image = None,
    attn: o.Attn = "sdpa",
    json: o.Json = False,
) -> None:
    """Substitute and fit, without labels, within a time budget; resumes after a kill.

    With --loss the fitted model is then fine-tuned on labelled data.

    Example: rewriter fit minilm --form hedgehog --seconds 240 -o fitted/
    """
    import shutil

    from rewriter.cli.labelled import named_loss, tune_labelled
    from rewriter.cli.work import check_budget, fit_model
    from rewriter.folder import FILES, save_rewritten
    from rewriter.outputs import check_folder

    check_budget("--seconds", seconds, max_drop, least=0 if max_drop is not None or loss else 1)
    check_folder(output, FILES, "--output")
    chosen_loss = named_loss(loss, data, loss_seconds)
    loaded = o.open_model(model, tokens, batch, image, attn)
    kept = state or output.with_name(output.name + ".state")
    result = fit_model(
        loaded,
        form,
        plan,
        rule,
        setting,
        seconds=seconds,
        data=data,
        max_drop=max_drop,
        state=kept,
        linear=linear,
    )
    if chosen_loss is not None:
        tune_labelled(loaded, result, data, chosen_loss, loss_seconds, kept)
    save_rewritten(result, output)
    if state is None:
        for folder in (kept, kept.with_name(f"{kept.name}-labelled")):
            shutil.rmtree(folder, ignore_errors=True)
    if json:
        print_json(result.report.to_json())
        return
    console.print(result.report.table())
    console.print(result.report.summary(), markup=False)
