"""Linear layers of a rewritten model: read what the user asked for, and convert.

A request is ``form[:option=value...][,pattern...]`` ("shift", "shift:bits=5,encoder.*"), a linear
form, or a mapping from patterns over layer ids (module paths) to forms; the first match wins.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from passes.errors import NothingRewritten, UsageError
from passes.site import SiteStatus

if TYPE_CHECKING:
    import torch

    from codegen.target import Target
    from passes.linear_form import LinearForm
    from passes.linear_layers import LinearLayer
    from passes.plan import Choice
    from rewriter.api import Result
    from rewriter.moe_latency import Timer

Batches = Sequence[Mapping[str, "torch.Tensor"]]
Request = "str | LinearForm | Sequence[str] | Mapping[str, str | LinearForm]"


def linear_rules(linear: Any) -> dict[str, LinearForm]:
    """{pattern: form} of a request; later requests of a list are asked after earlier ones.

    Raises:
        UsageError: not a request, or an unknown form or option.
    """
    from passes.linear_form import LinearForm

    if isinstance(linear, LinearForm):
        return {"*": linear}
    if isinstance(linear, str):
        return _read(linear)
    if isinstance(linear, Mapping):
        return {p: f if isinstance(f, LinearForm) else _form(f) for p, f in linear.items()}
    if isinstance(linear, Sequence) and linear:
        made: dict[str, LinearForm] = {}
        for one in linear:
            made = {**made, **{p: f for p, f in linear_rules(one).items() if p not in made}}
        return made
    raise UsageError(
        f"linear: expected 'form', 'form,pattern' or {{pattern: form}}, got {linear!r}"
    )


def _read(text: str) -> dict[str, LinearForm]:
    name, *patterns = (part.strip() for part in text.split(","))
    if not all(patterns):
        raise UsageError(f"linear: an empty pattern in {text!r}")
    form = _form(name)
    return dict.fromkeys(patterns or ["*"], form)


def _form(text: str) -> LinearForm:
    from passes.linear_form import linear_form_named

    name, *settings = text.split(":")
    config: dict[str, Any] = {}
    for setting in settings:
        option, equals, value = setting.partition("=")
        if not equals or not option or not value:
            raise UsageError(f"linear: {setting!r} of {text!r} should be option=value")
        try:
            config[option] = json.loads(value)
        except ValueError:
            config[option] = value
    return linear_form_named(name, config)


def convert_linears(
    result: Result,
    linear: Any = None,
    data: Batches | None = None,
    *,
    strict: bool = True,
    target: str | Target = "cpu",
    timer: Timer | None = None,
) -> None:
    """Put linear forms at the layers `linear` names (or the result's own plan does), in place.

    Args:
        result: changed in place.
        linear: a request (`linear_rules`).
        data: model inputs that forms with calibration look at; without any, the example inputs.
        strict: it is an error if no layer changes.
        target: where the experts of two-expert layers are timed (rewriter/moe_latency.py).
        timer: in place of the clock there.

    Raises:
        NothingRewritten, UnmatchedRule, FormError, UsageError.
    """
    from passes.linear_form import linear_form_named
    from passes.linear_layers import find_linears
    from passes.linears import capture_inputs, plan_linears, put_linears
    from rewriter.moe_routing import tell_routing

    layers = find_linears(result.rewritten.module)
    asked = linear is not None
    choices = plan_linears(layers, linear_rules(linear)) if asked else dict(result.plan.linears)
    if asked and strict and not _changed(choices):
        raise NothingRewritten(_why_none(choices))
    choices = _timed(result, choices, layers, target, timer)
    needy = [
        i for i in _changed(choices)
        if linear_form_named(choices[i].form, choices[i].config).needs == "calibration"
    ]  # fmt: skip
    captured = (
        capture_inputs(result.rewritten.module, needy, data or [_example(result)]) if needy else {}
    )
    put_linears(result.rewritten, choices, captured)
    result.plan = result.rewritten.plan
    result.report = result.report.with_notes(told(choices))
    tell_routing(result, [_example(result)])
    if needy and data:  # on the example inputs anyone can calibrate again
        result.report = result.report.with_linear_fit(calibrated=needy)
    elif needy:
        result.report = result.report.with_notes(
            "Linear layers were calibrated on the example inputs alone; give real data."
        )


def _timed(
    result: Result,
    choices: dict[str, Choice],
    layers: Sequence[LinearLayer],
    target: str | Target,
    timer: Timer | None,
) -> dict[str, Choice]:
    """`choices` with the latencies of two-expert layers, which the report then holds."""
    from passes.linears import count_rows
    from rewriter.moe_latency import with_latencies

    def rows(ids: list[str]) -> dict[str, int]:
        return count_rows(result.rewritten.module, ids, _example(result))

    made, times = with_latencies(
        choices, {layer.id: layer for layer in layers}, rows, target=target, timer=timer
    )
    result.report = result.report.with_notes(*(t.sentence() for t in times)).with_experts(
        times=[t.to_json() for t in times]
    )
    return made


def _changed(choices: Mapping[str, Choice]) -> list[str]:
    return [i for i, c in choices.items() if c.status is SiteStatus.REWRITTEN]


def _why_none(choices: Mapping[str, Choice]) -> str:
    lines = [f"  {layer}: {c.status} {c.why}" for layer, c in choices.items()]
    head = "no linear layer would change; name the layers by a pattern, or leave linear out"
    return "\n".join(
        [head, *(lines or ["  the model has no linear layer with a weight of its own"])]
    )


def _example(result: Result) -> dict[str, torch.Tensor]:
    from rewriter.calibration import input_names

    traced = result.traced
    values = [*traced.example_args, *traced.example_kwargs.values()]
    return dict(zip(input_names(traced), values, strict=True))


def told(choices: Mapping[str, Choice]) -> str:
    """One sentence for the report: how many layers got what, and why others did not."""
    counts = Counter(
        c.form if c.status is SiteStatus.REWRITTEN else str(c.status).lower()
        for c in choices.values()
    )
    refused = [f"{i} ({c.why})" for i, c in choices.items() if c.status is SiteStatus.REFUSED]
    parts = ", ".join(f"{n} {name}" for name, n in counts.items())
    return f"Linear layers: {parts}." + (f" Refused: {'; '.join(refused)}." if refused else "")
