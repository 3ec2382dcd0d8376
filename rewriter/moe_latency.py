"""Latencies of the two experts of `moe` layers, put into the plan: measured, or counted.

Each shape is measured once, by the kernel that is compiled for the target, on as many tokens as the
layer has in the example inputs. Where the target does not run here the operations of the experts
are counted instead, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from passes.linear_forms.moe import Moe
from passes.plan import Choice
from passes.site import SiteStatus

if TYPE_CHECKING:
    from codegen.target import Target
    from passes.linear_layers import LinearLayer

Shape = tuple[int, int, int]  # tokens, inputs, outputs
Timer = Callable[[Callable[[], None], Callable[[], None]], tuple[float, float]]


@dataclass(frozen=True)
class ExpertTimes:
    """What the two experts of layers of one shape cost, in `unit`, and how that is known.

    `shape` is (tokens, inputs, outputs), `layers` the ids of the layers that have it.
    """

    shape: Shape
    multiply: float
    shift: float
    unit: str  # "µs" a call, "operations" or "parts"
    source: str
    layers: tuple[str, ...] = ()

    def sentence(self) -> str:
        """For the report."""
        rows, inputs, outputs = self.shape
        share = self.multiply / (self.multiply + self.shift)
        layers = f"{len(self.layers)} layer" + "s" * (len(self.layers) != 1)
        return (
            f"moe, {layers} {inputs} -> {outputs} on {rows} tokens: "
            f"multiply {self.multiply:.4g}, shift {self.shift:.4g} {self.unit} ({self.source}); "
            f"balanced with {1 - share:.0%} of the tokens at multiply."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "shape": list(self.shape), "layers": list(self.layers)}


def with_latencies(
    choices: Mapping[str, Choice],
    layers: Mapping[str, LinearLayer],
    rows: Callable[[list[str]], Mapping[str, int]],
    *,
    target: str | Target = "cpu",
    timer: Timer | None = None,
) -> tuple[dict[str, Choice], list[ExpertTimes]]:
    """`choices` with latencies in the config of every `moe` layer: those given, or new ones.

    Args:
        choices: layer id -> Choice.
        layers: layer id -> LinearLayer.
        rows: tokens of each of some layers (called only if one needs them).
        target: what the layers will be compiled for.
        timer: in place of the clock: called with two functions that run the kernel with all
            tokens at (multiply, shift), gives the seconds of each.

    Returns:
        (choices, what was given, measured or counted).
    """
    from codegen.target import target_named

    mine = [i for i, c in choices.items() if _is_moe(c)]
    if not mine:
        return dict(choices), []
    chosen = target_named(target) if isinstance(target, str) else target
    tokens, made = rows(mine), dict(choices)
    known: dict[Any, ExpertTimes] = {}
    for layer in mine:
        shape = (tokens[layer], layers[layer].inputs, layers[layer].outputs)
        form, bias = Moe(choices[layer].config), layers[layer].bias is not None
        key = (shape, bias, repr(form.config.to_json()))
        if key not in known:
            known[key] = _times(form, shape, bias, chosen, timer)
        times = known[key] = replace(known[key], layers=(*known[key].layers, layer))
        config = {
            **choices[layer].config,
            "latencies": [times.multiply, times.shift],
            "source": times.source,
        }
        made[layer] = replace(choices[layer], config=config)
    return made, list(known.values())


def _is_moe(choice: Choice) -> bool:
    return choice.status is SiteStatus.REWRITTEN and choice.form == Moe.name


def _times(form: Moe, shape: Shape, bias: bool, target: Target, timer: Timer | None) -> ExpertTimes:
    from codegen.dispatch_time import expert_seconds, why_not_timed
    from passes.linear_form import LinearSpec

    rows, inputs, outputs = shape
    spec = LinearSpec(form.name, inputs, outputs, bias)
    if form.config.latencies is not None:
        source = form.config.source or "given"
        return ExpertTimes(shape, *form.times(spec), _unit(source), source)
    why = why_not_timed(target)
    if why:
        first, second = form.times(spec, rows)
        source = f"counted, not measured on {target.name}: {why}"
        return ExpertTimes(shape, first, second, _unit(source), source)
    seconds = expert_seconds(target, form.shift.codes, shape, bias=bias, timer=timer)
    first, second = (round(s * 1e6, 3) for s in seconds)
    source = f"measured on {target.name}"
    return ExpertTimes(shape, first, second, _unit(source), source)


def _unit(source: str) -> str:
    """The unit of latencies from `source`."""
    return {"measured": "µs", "counted,": "operations"}.get(source.partition(" ")[0], "parts")
