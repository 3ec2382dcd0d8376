"""Energy of a whole model before and after a rewrite: operations by layer, priced.

`count` prices the operations of rewriter/energy_count.py; prices are those of codegen/energy.py.
`eyeriss` runs every layer through the accelerator model of codegen/eyeriss.py, `eyeriss-released`
with the defects of the script that came with it. Estimates, not measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from codegen.energy import HOROWITZ_45NM, EnergyTable, energy
from passes.errors import UnknownName, UsageError
from passes.opcount import OpCount
from passes.site import SiteStatus

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from passes.plan import Plan
    from passes.substitute import Rewritten
    from passes.traced import Traced
    from rewriter.energy_count import Linears

KINDS = ("mul", "add", "shift", "popcount")
MODELS = ("count", "eyeriss", "eyeriss-released")
PICOJOULES = 1e9  # in a millijoule


@dataclass(frozen=True)
class Cost:
    """Operations charged and their energy in millijoules; bytes of linear layers' weights.

    The accelerator model adds the energy of arithmetic alone and a simulated time.
    """

    ops: OpCount
    energy_mj: float
    arithmetic_mj: float | None = None
    latency_ms: float | None = None
    weight_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """{"mul": n, "add": n, "shift": n, "popcount": n, "energy_mj": x, "weight_bytes": n}, and
        the model's more."""
        data: dict[str, Any] = {
            **{kind: self.ops.total(kind) for kind in KINDS},
            "energy_mj": self.energy_mj,
            "weight_bytes": self.weight_bytes,
        }
        if self.latency_ms is not None:
            data |= {"arithmetic_mj": self.arithmetic_mj, "latency_ms": self.latency_ms}
        return data

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.ops + other.ops,
            self.energy_mj + other.energy_mj,
            _both(self.arithmetic_mj, other.arithmetic_mj),
            _both(self.latency_ms, other.latency_ms),
            self.weight_bytes + other.weight_bytes,
        )


def _both(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


@dataclass(frozen=True)
class LayerCost:
    """One layer before and after; None where it is not there."""

    name: str
    kind: str
    before: Cost | None
    after: Cost | None
    form: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "form": self.form,
            "before": self.before.to_json() if self.before else None,
            "after": self.after.to_json() if self.after else None,
        }


@dataclass(frozen=True)
class EnergyReport:
    """The energy of a model. `unpriced` are operations the table has no price for, after."""

    model: str
    rule: str
    source: str
    before: Cost
    after: Cost
    layers: tuple[LayerCost, ...]
    unpriced: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def saved(self) -> float:
        """The part of the energy that is saved (negative: more is needed)."""
        return 1 - self.after.energy_mj / self.before.energy_mj if self.before.energy_mj else 0.0

    def summary(self) -> str:
        """One or two sentences."""
        a, b = self.before, self.after
        text = f"{self.model}, by the rule {self.rule!r}: {_words(a)} before"
        if a != b:
            more = "less" if self.saved > 0 else "more"
            text += f", {_words(b)} after: {abs(self.saved):.1%} {more} energy"
        if a.weight_bytes != b.weight_bytes:
            held = [f"{cost.weight_bytes / 1e6:.3g}" for cost in (a, b)]
            text += f", weights of linear layers {held[0]} -> {held[1]} MB"
        return f"{text}. An estimate from counted operations, not a measurement."

    def to_json(self) -> dict[str, Any]:
        """Plain data: "before", "after" and "layers" by the contract of `Cost.to_json`."""
        return {
            "model": self.model,
            "rule": self.rule,
            "source": self.source,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "saved": self.saved,
            "layers": [layer.to_json() for layer in self.layers],
            "unpriced": dict(self.unpriced),
            "notes": list(self.notes),
        }


def _words(cost: Cost) -> str:
    counts = [f"{cost.ops.total(k) / 1e9:.3g} G {k}" for k in KINDS if cost.ops.total(k)]
    return f"{cost.energy_mj:.4g} mJ ({', '.join(counts)})"


def price(ops: OpCount, table: EnergyTable = HOROWITZ_45NM) -> Cost:
    """Arithmetic alone: mul, add and shift by the table (memory is not part of this rule)."""
    charged = OpCount({key: n for key, n in ops.ops.items() if key[0] in KINDS and n})
    return Cost(charged, sum(energy(charged, table).arithmetic.values()) / PICOJOULES)


def energy_report(
    traced: Traced,
    plan: Plan,
    *,
    name: str = "model",
    model: str = "count",
    linear: Any = None,
) -> EnergyReport:
    """Energy of the traced model as it is and with `plan`'s forms, for its example inputs.

    Args:
        traced: a canonical graph traced with static shapes.
        plan: what each site and linear layer gets; nothing is fitted and no weight is read.
        name: what the report calls the model.
        model: the energy model, one of `MODELS`.
        linear: what linear layers become, as in `rewrite`; by default what the plan says.

    Raises:
        UnknownName: no such energy model.
        UsageError: the model has a dynamic size.
        UnmatchedRule, FormError, PlanError: as `substitute` and `plan_linears`.
    """
    from passes.find import find
    from passes.plan import Plan
    from passes.substitute import substitute
    from rewriter.energy_linears import choices_of, coded_layers
    from rewriter.linear_work import told

    if model not in MODELS:
        raise UnknownName("energy model", model, MODELS)
    sites = find(traced).sites
    before = substitute(traced, sites, Plan({}))
    after = substitute(traced, sites, plan)
    choices = choices_of(after.module, linear, plan.linears)
    report = compare(before, after, name, model, coded_layers(after.module, choices))
    more = [told(choices)] if choices else []
    return replace(report, notes=(*left_as_they_are(plan), *more, *report.notes))


def left_as_they_are(plan: Plan) -> list[str]:
    """A sentence for every reason why sites of a plan keep their softmax."""
    counts: dict[str, int] = {}
    for choice in plan.choices.values():
        if choice.status is not SiteStatus.REWRITTEN:
            # A refusal names its site; by its code alone equal ones count together.
            refused = choice.status is SiteStatus.REFUSED
            word = (
                ", refused by ".join(reversed(choice.why.split(": ")[:2]))
                if refused
                else choice.why
            )
            counts[word] = counts.get(word, 0) + 1
    return [f"{n} of {len(plan.choices)} sites keep their softmax ({w})" for w, n in counts.items()]


def compare(
    before: Rewritten,
    after: Rewritten,
    name: str,
    model: str = "count",
    linears: Linears | None = None,
) -> EnergyReport:
    """Both models by one energy model, layer by layer; `linears` are the coded ones of `after`."""
    try:
        old, new = _costs(before.module, model), _costs(after.module, model, linears)
    except ValueError as error:
        raise UsageError(f"energy model {model}: {error}") from error
    rows = []
    for key in [*old, *(k for k in new if k not in old)]:
        form = new[key][1] if key in new else ""
        pair = [side[key][0] if key in side else None for side in (old, new)]
        rows.append(LayerCost(*key, pair[0], pair[1], form))
    zero = Cost(OpCount(), 0.0) if model == "count" else Cost(OpCount(), 0.0, 0.0, 0.0)
    was, now = (sum((cost for cost, _ in side.values()), zero) for side in (old, new))
    rest, notes = _left_out(after, model, linears)
    return EnergyReport(name, model, _SOURCES[model], was, now, tuple(rows), rest, notes)


def _costs(
    module: GraphModule, model: str, linears: Linears | None = None
) -> dict[tuple[str, str], tuple[Cost, str]]:
    """{(layer, kind): (cost, form)}."""
    from rewriter.energy_count import count_layers
    from rewriter.energy_nests import model_layers

    if model == "count":
        return {
            (x.name, x.kind): (replace(price(x.ops), weight_bytes=x.weights), x.form)
            for x in count_layers(module, linears)
        }
    return {
        (m.layer.name, m.layer.kind): (
            Cost(m.ops, m.cost.energy_mj, m.cost.arithmetic_mj, m.cost.latency_ms, m.layer.weights),
            m.layer.form,
        )
        for m in model_layers(module, linears, released=model == "eyeriss-released")
    }


def _left_out(
    after: Rewritten, model: str, linears: Linears | None
) -> tuple[dict[str, int], tuple[str, ...]]:
    """(operations without a price, what the reader must know)."""
    from rewriter.energy_count import count_layers
    from rewriter.energy_nests import model_layers

    if model == "count":
        ops = sum((x.ops for x in count_layers(after.module, linears)), OpCount())
        priced = HOROWITZ_45NM.picojoules
        return {f"{op}:{t}": n for op, t, n in ops if (op, t) not in priced}, ()
    told = dict.fromkeys(m.told for m in model_layers(after.module, linears) if m.told)
    return {}, tuple(told)


_ACCELERATOR = (
    "accelerator model: You et al., ShiftAddViT, NeurIPS 2023 (row-stationary array, 45 nm)"
)
_SOURCES = {
    "count": f"counting rule: Liu et al., EcoFormer, NeurIPS 2022; prices: {HOROWITZ_45NM.source}",
    "eyeriss": f"{_ACCELERATOR}, with products of attention and hashing counted",
    "eyeriss-released": f"{_ACCELERATOR}, as the released script counts",
}
