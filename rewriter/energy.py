"""Energy of a whole model before and after a rewrite: operations by layer, priced.

`count` prices the operations of rewriter/energy_count.py; prices are those of codegen/energy.py.
An estimate from counted operations, not a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from codegen.energy import HOROWITZ_45NM, EnergyTable, energy
from passes.errors import UnknownName, UsageError
from passes.opcount import OpCount

if TYPE_CHECKING:
    from passes.plan import Plan
    from passes.substitute import Rewritten
    from passes.traced import Traced

KINDS = ("mul", "add", "shift", "popcount")
MODELS = ("count",)
PICOJOULES = 1e9  # in a millijoule


@dataclass(frozen=True)
class Cost:
    """Operations charged and their energy in millijoules."""

    ops: OpCount
    energy_mj: float

    def to_json(self) -> dict[str, Any]:
        """{"mul": n, "add": n, "shift": n, "popcount": n, "energy_mj": x}."""
        return {**{kind: self.ops.total(kind) for kind in KINDS}, "energy_mj": self.energy_mj}


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
    traced: Traced, plan: Plan, *, name: str = "model", model: str = "count"
) -> EnergyReport:
    """Energy of the traced model as it is and with `plan`'s forms, for its example inputs.

    Args:
        traced: a canonical graph traced with static shapes.
        plan: what each site gets; nothing is fitted and no weight is read.
        name: what the report calls the model.
        model: the energy model, one of `MODELS`.

    Raises:
        UnknownName: no such energy model.
        UsageError: the model has a dynamic size.
        FormError, PlanError: as `substitute`.
    """
    from passes.find import find
    from passes.plan import Plan
    from passes.substitute import substitute

    if model not in MODELS:
        raise UnknownName("energy model", model, MODELS)
    sites = find(traced).sites
    before = substitute(traced, sites, Plan({}))
    after = substitute(traced, sites, plan)
    return compare(before, after, name)


def compare(before: Rewritten, after: Rewritten, name: str) -> EnergyReport:
    """Both models by the rule `count`, layer by layer."""
    from rewriter.energy_count import count_layers

    try:
        old, new = (
            {(layer.name, layer.kind): layer for layer in count_layers(r.module)}
            for r in (before, after)
        )
    except ValueError as error:
        raise UsageError(f"{error}; count a model that was traced with static shapes") from error
    rows = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        before_, after_ = (price(layer.ops) if layer else None for layer in (a, b))
        rows.append(LayerCost(*key, before_, after_, b.form if b else ""))
    totals = [sum((x.ops for x in side.values()), OpCount()) for side in (old, new)]
    rest = {f"{op}:{t}": n for op, t, n in totals[1] if (op, t) not in HOROWITZ_45NM.picojoules}
    return EnergyReport(
        name, "count", _SOURCE, price(totals[0]), price(totals[1]), tuple(rows), rest
    )


_SOURCE = f"counting rule: Liu et al., EcoFormer, NeurIPS 2022; prices: {HOROWITZ_45NM.source}"
