"""`rewriter compile`: a model in, one verified artifact out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from passes.errors import UsageError
from rewriter.cli import options as o
from rewriter.cli.output import console, print_json

Output = Annotated[Path, typer.Option("--output", "-o", help="The artifact to write (.rwa).")]
Seconds = Annotated[float, typer.Option("--fit", help="Seconds of label-free fitting first.")]
Session = Annotated[
    Path | None, typer.Option("--session", help="Apply the records of a tuning session.")
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        help="Of products with weights: fp32, bf16 or int8 (softmax attention: bf16 for both).",
    ),
]
Unscheduled = Annotated[
    bool, typer.Option("--allow-unscheduled", help="Let kernels without a schedule through (slow).")
]

Decode = Annotated[
    bool, typer.Option("--decode", help="Make a language model generate: rewriter run --generate.")
]
MaxLength = Annotated[
    int | None,
    typer.Option(min=1, help="With --decode: longest sequence, prompt and new tokens together."),
]


def _state(output: Path) -> Path:
    """Where a killed fit goes on from."""
    return output.with_name(output.name + ".fit")


def verb(
    model: o.Model,
    output: Output,
    form: o.Form = None,
    plan: o.PlanFile = None,
    rule: o.Rules = None,
    setting: o.Config = None,
    linear: o.Linear = None,
    source: o.Source = None,
    fit: Seconds = 0.0,
    data: o.Data = None,
    max_drop: o.MaxDrop = None,
    target: o.Target = "cpu",
    precision: Precision = "fp32",
    session: Session = None,
    allow_unscheduled: Unscheduled = False,
    allow_none: o.AllowNone = False,
    decode: Decode = False,
    max_length: MaxLength = None,
    tokens: o.Tokens = None,
    batch: o.Batch = 1,
    image: o.Image = None,
    attn: o.Attn = "sdpa",
    threads: o.Threads = None,
    html: o.Html = None,
    json: o.Json = False,
) -> None:
    """Compile MODEL for a target into one file, verified against the model it came from.

    Without --form, --plan, --rule, --linear or --from every attention stays exact. With --decode a
    decoder-only language model (GPT-2, Llama, Mistral) becomes an artifact that generates tokens.

    Example: rewriter compile minilm --form hedgehog --fit 240 --tokens 128 -o minilm.rwa
    """
    from codegen.precision import require
    from codegen.target import target_named
    from rewriter.cli.decode_work import check_decode, compile_result, for_decode
    from rewriter.cli.work import (
        any_plan,
        check_budget,
        fit_model,
        from_folder,
        progress_bar,
        rewrite_model,
    )
    from rewriter.outputs import check_file

    check_file(output, "--output")
    check_file(html, "--html")
    check_budget("--fit", fit, max_drop, least=0)
    check_decode(decode, max_length, session)
    made_for = target_named(target)
    require(precision, made_for)
    if source is not None and any_plan(form, plan, rule):
        raise UsageError("give --from or a form, plan or rule, not both")
    if source is not None and linear:
        raise UsageError("give --from or --linear, not both: the folder says what is in it")
    if (fit or max_drop is not None) and not (any_plan(form, plan, rule) or linear):
        raise UsageError("--fit and --max-drop need --form, --plan or --rule: what is to be fitted")
    loaded = for_decode(o.open_model(model, tokens, batch, image, attn), decode)
    if source is not None:
        result = from_folder(loaded, source)
    elif fit or max_drop is not None:
        result = fit_model(
            loaded,
            form,
            plan,
            rule,
            setting,
            seconds=fit,
            data=data,
            max_drop=max_drop,
            state=_state(output) if fit else None,
            linear=linear,
            target=made_for,
        )
    else:
        default = None if any_plan(form, plan, rule) or linear else "exact"
        result = rewrite_model(
            loaded,
            form or default,
            plan,
            rule,
            setting,
            allow_none=allow_none,
            linear=linear,
            target=made_for,
        )
    with progress_bar("compile") as progress:
        artifact = compile_result(
            loaded,
            result,
            decode,
            max_length,
            path=output,
            target=made_for,
            session=session,
            allow_unscheduled=allow_unscheduled,
            threads=threads,
            precision=precision,
            progress=progress,
        )
    if fit and source is None:
        shutil.rmtree(_state(output), ignore_errors=True)
    if html is not None:
        result.report.save_html(html)
    if json:
        facts = artifact.report.get("artifact") or {}
        print_json({**artifact.report, "memory": facts.get("memory")})
        return
    console.print(result.report.table())
    console.print(result.report.summary(), markup=False)
    console.print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)", markup=False)
