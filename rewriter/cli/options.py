"""The options that several verbs share, described once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from passes.errors import UsageError

if TYPE_CHECKING:
    from rewriter.models import LoadedModel

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Local Hugging Face folder, hub id, .pt2, package.module:factory, or a built-in name.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens of the example input (text models).")]
Batch = Annotated[int, typer.Option(help="Batch size of the example input.", min=1)]
Image = Annotated[int | None, typer.Option(help="Pixels per side of the example image.")]
Attn = Annotated[str, typer.Option(help="transformers' attention code: sdpa or eager.")]
Form = Annotated[str | None, typer.Option("--form", help="Form for every site (rewriter forms).")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="A saved plan (JSON).")]
Rules = Annotated[
    list[str] | None,
    typer.Option("--rule", metavar="PATTERN=FORM", help="Form for the sites a glob matches."),
]
Linear = Annotated[
    list[str] | None,
    typer.Option(
        "--linear",
        metavar="FORM[:OPTION=VALUE][,PATTERN]",
        help="What linear layers become (shift, shiftadd_ptq, moe); the first and last are kept.",
    ),
]
Config = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="OPTION=VALUE", help="An option of --form; may be repeated."),
]
Source = Annotated[
    Path | None,
    typer.Option("--from", help="A folder written by `rewriter fit` or `rewriter rewrite`."),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(help="Revert the worst sites until 1 - mean cosine is at most this."),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Calibration data: a .txt file, or .npz of the model's inputs."),
]
AllowNone = Annotated[bool, typer.Option("--allow-none", help="Zero rewrites is no error.")]
Html = Annotated[Path | None, typer.Option("--html", help="Also write the report as a page.")]
Target = Annotated[str, typer.Option("--target", help="Target name (rewriter targets).")]
Threads = Annotated[
    int | None, typer.Option(help="Threads; default: the cores this process may use.", min=1)
]


def open_model(
    model: str, tokens: int | None, batch: int, image: int | None, attn: str
) -> LoadedModel:
    """MODEL as a module with example inputs."""
    from rewriter.models import load_model

    return load_model(model, tokens=tokens, batch=batch, image=image, attn=attn)


def parse_rules(rules: list[str] | None) -> dict[str, str] | None:
    """``["encoder.*=hedgehog"]`` -> ``{"encoder.*": "hedgehog"}``."""
    if not rules:
        return None
    return dict(_pair("--rule", rule) for rule in rules)


def parse_config(settings: list[str] | None) -> dict[str, Any]:
    """``["chunk=64"]`` -> ``{"chunk": 64}``; a value is JSON where it can be, else text."""
    import json

    config: dict[str, Any] = {}
    for setting in settings or []:
        name, value = _pair("--set", setting)
        try:
            config[name] = json.loads(value)
        except ValueError:
            config[name] = value
    return config


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise UsageError(f"{option} {text!r}: expected NAME=VALUE")
    return name, value
