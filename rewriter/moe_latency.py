"""Latencies of the two experts of `moe` layers, put into the plan: measured, or counted.

Each shape is measured once, by the kernel that is compiled for the target, on as many tokens as the
layer has in the example inputs. Where the target does not run here the operations of the experts
are counted instead, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from passes.plan import Choice
from passes.site import SiteStatus

if TYPE_CHECKING:
    from codegen.target import Target
    from passes.linear_forms.moe import Moe
    from passes.linear_layers import LinearLayer

Shape = tuple[int, int, int]  # tokens, inputs, outputs
Timer = Callable[[Callable[[], None], Callable[[], None]], tuple[float, float]]


@dataclass(frozen=True)
class ExpertTimes:
    """What the two experts of layers of one shape cost: microseconds a call, or operations.

    `shape` is (tokens, inputs, outputs), `layers` the ids of the layers that have it.
    """

    shape: Shape
    multiply: float
    shift: float
    source: str
    layers: tuple[str, ...]
    measured: bool

    def sentence(self) -> str:
        """For the report."""
        rows, inputs, outputs = self.shape
        unit = "µs" if self.measured else "operations"
        share = self.multiply / (self.multiply + self.shift)
        return (
            f"moe, {len(self.layers)} layers {inputs} -> {outputs} on {rows} tokens: multiply "
            f"{self.multiply:.4g}, shift {self.shift:.4g} {unit} ({self.source}); balanced with "
            f"{1 - share:.0%} of the tokens at multiply."
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
    """`choices` with latencies in the config of every `moe` layer that has none.

    Args:
        choices: layer id -> Choice.
        layers: layer id -> LinearLayer.
        rows: tokens of each of some layers (called only if one needs them).
        target: what the layers will be compiled for.
        timer: in place of the clock: called with two functions that run the kernel with all
            tokens at (multiply, shift), gives the seconds of each.

    Returns:
        (choices, what was measured or counted).
    """
    from codegen.target import target_named

    needy = [i for i, c in choices.items() if _needs(c)]
    if not needy:
        return dict(choices), []
    chosen = target_named(target) if isinstance(target, str) else target
    tokens, known, made = rows(needy), {}, dict(choices)
    for layer in needy:
        shape = (tokens[layer], layers[layer].inputs, layers[layer].outputs)
        form = _form(choices[layer])
        key = (shape, form.config.bits, layers[layer].bias is not None)
        if key not in known:
            known[key] = _times(form, shape, key[2], chosen, timer)
        times = known[key] = replace(known[key], layers=(*known[key].layers, layer))
        config = {
            **choices[layer].config,
            "latencies": [times.multiply, times.shift],
            "source": times.source,
        }
        made[layer] = replace(choices[layer], config=config)
    return made, list(known.values())


def _needs(choice: Choice) -> bool:
    if choice.status is not SiteStatus.REWRITTEN or choice.form != "moe":
        return False
    return choice.config.get("latencies") is None


def _form(choice: Choice) -> Moe:
    from passes.linear_forms.moe import Moe

    return Moe(choice.config)


def _times(form: Moe, shape: Shape, bias: bool, target: Target, timer: Timer | None) -> ExpertTimes:
    from codegen.dispatch_time import expert_seconds, why_not_timed
    from passes.linear_form import LinearSpec

    why = why_not_timed(target)
    if why:
        rows, inputs, outputs = shape
        first, second = form.times(LinearSpec(form.name, inputs, outputs, bias), rows)
        source = f"counted, not measured on {target.name}: {why}"
        return ExpertTimes(shape, first, second, source, (), measured=False)
    seconds = expert_seconds(target, form.shift.codes, shape, bias=bias, timer=timer)
    first, second = (round(s * 1e6, 3) for s in seconds)
    source = f"measured on {target.name}"
    return ExpertTimes(shape, first, second, source, (), measured=True)
