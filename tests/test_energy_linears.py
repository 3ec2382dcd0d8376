"""Linear layers without multiplications in the energy report: counts, bytes, published totals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import rewriter
from passes.errors import UnmatchedRule
from passes.linear_form import LinearSpec, linear_form_named, linear_forms
from passes.opcount import OpCount
from passes.plan import Plan
from rewriter.api import find_sites
from rewriter.energy import energy_report, price
from rewriter.energy_linears import Coded, counted, packed_bytes, plain_bytes
from tests.test_energy import rewritten

Params = dict[str, torch.Tensor]
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("shift", {}), ("shift", {"bits": 3, "base": "one"}), ("shift", {"bits": 5, "terms": 2}),
    ("shiftadd_ptq", {}), ("shiftadd_ptq", {"bits": 2, "terms": 1}),
    ("moe", {"latencies": [6, 4]}), ("moe", {"bits": 5}),
]  # fmt: skip


def coded(name: str, config: dict[str, Any], k: int, n: int, bias: bool = True) -> Coded:
    form = linear_form_named(name, config)
    return Coded(form, LinearSpec(name, k, n, bias, form.config.to_json()))


def test_every_linear_form_is_tried_here() -> None:
    assert {name for name, _ in CONFIGS} == set(linear_forms())


@pytest.mark.parametrize(("name", "config"), CONFIGS)
@pytest.mark.parametrize("bias", [True, False])
def test_bytes_are_those_of_the_packed_tensors(
    name: str, config: dict[str, Any], bias: bool
) -> None:
    n, k = 40 + int(torch.randint(1, 60, ())), 8 + int(torch.randint(1, 40, ()))
    layer = coded(name, config, k, n, bias)
    params = layer.form.convert(torch.randn(n, k), torch.randn(n) if bias else None)
    held = layer.form.pack(params)
    wanted = sum(t.numel() * t.element_size() for t in held.values()) + 4 * n * bias
    assert packed_bytes(layer) == wanted
    assert plain_bytes(k, n, bias) == 4 * n * (k + bias)


class Scalar:
    """Products, sums and shifts (products with powers of two), one at a time and counted."""

    def __init__(self) -> None:
        self.ops = {"mul": 0, "add": 0, "shift": 0}

    def add(self, a: float, b: float) -> float:
        self.ops["add"] += 1
        return a + b

    def shift(self, a: float, power: float) -> float:
        assert power == 0 or math.frexp(abs(power))[0] == 0.5
        self.ops["shift"] += 1
        return a * power

    def powers(self, x: float, scale: float, terms: int) -> float:
        """x times a sum of `terms` signed powers of two."""
        total = 0.0
        for term in range(terms):
            power = math.copysign(2.0 ** round(math.log2(abs(scale))), scale) if scale else 0.0
            part = self.shift(x, power)
            total, scale = (self.add(total, part) if term else part), scale - power
        return total


def shifts_by_scalar(run: Scalar, layer: Coded, row: list[float], params: Params) -> list[float]:
    scale = torch.exp2(params["base"])
    levels = (layer.form.weight(params) / scale[:, None]).tolist()
    out = []
    for weights, factor in zip(levels, scale.tolist(), strict=True):
        total = 0.0
        for value, weight in zip(row, weights, strict=True):
            total = run.add(total, run.shift(value, weight))
        out.append(total if layer.spec.config["base"] == "one" else run.shift(total, factor))
    return out


def signs_by_scalar(run: Scalar, layer: Coded, row: list[float], params: Params) -> list[float]:
    bits, terms = (layer.spec.config[key] for key in ("bits", "terms"))
    alphas = params["alpha"].tolist()
    scaled = [
        [run.powers(x, a, terms) for a in alpha] for x, alpha in zip(row, alphas, strict=True)
    ]
    out = []
    for codes, base in zip(params["codes"].int().tolist(), params["base"].tolist(), strict=True):
        total = 0.0
        for values, code in zip(scaled, codes, strict=True):
            for bit in range(bits):
                total = run.add(total, values[bit] if code >> bit & 1 else -values[bit])
        out.append(run.shift(total, 2.0**base))
    return out


@pytest.mark.parametrize(
    ("name", "config"), [c for c in CONFIGS if c[0] != "moe" and c[1].get("terms") != 2]
)
def test_counts_by_a_layer_written_out(name: str, config: dict[str, Any]) -> None:
    layer = coded(name, config, 5, 3, bias=False)
    params = layer.form.convert(torch.rand(3, 5) * 1.8 - 0.9, None)
    x = torch.randn(2, 5)
    run = Scalar()
    one = shifts_by_scalar if name == "shift" else signs_by_scalar
    out = torch.tensor([one(run, layer, row, params) for row in x.tolist()])
    torch.testing.assert_close(out, layer.form.forward(params, x), rtol=1e-4, atol=1e-5)
    rule = counted(layer, 2)
    assert {op: rule.total(op) for op in run.ops} == run.ops
    assert all(dtype == ("int32" if op == "shift" else "float32") for op, dtype, _ in rule)


def test_two_terms_cost_twice_and_a_mixture_is_a_mixture() -> None:
    one, two = (coded("shift", {"bits": 5, "terms": t, "base": "one"}, 7, 9) for t in (1, 2))
    assert counted(two, 4) == counted(one, 4) * 2
    mixed = counted(coded("moe", {"latencies": [6, 4]}, 7, 9), 100)
    shift = counted(coded("shift", {}, 7, 9), 60)
    router = 2 * 100 * 7
    assert mixed == shift + OpCount.of(mul=router + 40 * 63, add=router + 40 * 63)


@pytest.mark.parametrize(
    ("size", "mlp", "mul", "add", "shift", "energy"),
    [
        ("B0", False, 0.4709, 0.5684, 0.0686, 2.263),
        ("B0", True, 0.1337, 0.5684, 0.4058, 1.059),
        pytest.param("B1", True, 0.4149, 2.0965, 1.6233, 3.633),
        pytest.param("B2", True, 0.5276, 3.9796, 3.3413, 5.968, marks=pytest.mark.slow),
    ],
)
def test_shiftaddvit_by_the_rule(
    size: str, mlp: bool, mul: float, add: float, shift: float, energy: float
) -> None:
    """Hashed attention with shift layers in it, in the first three stages, and in all MLPs."""
    asked = {"pvt_v2.encoder.layers.[012].*.attention.*": "shift:base=one"}
    made = rewritten(size, "shiftadd", asked | ({"*mlp*": "shift:base=one"} if mlp else {}))
    ops = made.after.ops
    assert ops.total("mul") / 1e9 == pytest.approx(mul, abs=6e-5)
    assert ops.total("add") / 1e9 == pytest.approx(add, abs=6e-5)
    assert ops.total("shift") / 1e9 == pytest.approx(shift, abs=6e-5)
    assert made.after.energy_mj == pytest.approx(energy, abs=6e-4)
    assert not made.unpriced


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.down(self.mid(self.mid(self.up(x)).relu()).relu())
        return made


def test_a_layer_that_runs_twice_is_held_once() -> None:
    """Its weight is shared by two calls, so no form can stand there; the others can."""
    traced, _ = find_sites(Mlp().eval(), {"x": torch.randn(2, 5, 8)})
    made = energy_report(traced, Plan({}), linear="shift,[a-z]*")
    rows = {x.name: x for x in made.layers}
    assert made.before.weight_bytes == 4 * (8 * 64 + 64 + 64 * 64 + 64 + 64 * 8 + 8)
    assert rows["mid"].before == rows["mid"].after
    assert rows["mid#1"].after is not None
    assert rows["mid#1"].after.weight_bytes == 0
    assert rows["up"].form == "shift"
    assert rows["up"].after == made_by_hand(coded("shift", {}, 8, 64), 10)
    assert made.notes[0].startswith("Linear layers: 2 shift, 2 refused. Refused: mid")


def made_by_hand(layer: Coded, rows: int) -> Any:
    held = packed_bytes(layer)
    assert held is not None
    return replace(price(counted(layer, rows)), weight_bytes=held)


def test_a_plan_says_what_the_option_says() -> None:
    model, x = Mlp().eval(), torch.randn(3, 8)
    plan = rewriter.rewrite(model, (x,), linear="shift:bits=5,up").plan
    traced, _ = find_sites(model, (x,))
    by_plan, by_option = (
        energy_report(traced, plan), energy_report(traced, Plan({}), linear="shift:bits=5,up"),
    )  # fmt: skip
    assert by_plan.to_json() == by_option.to_json()
    other, _ = find_sites(nn.Sequential(nn.Linear(8, 8)).eval(), (x,))
    with pytest.raises(UnmatchedRule, match="plan names linear layer 'up'"):
        energy_report(other, plan)
    with pytest.raises(UnmatchedRule, match="'nosuch' matches no linear layer"):
        energy_report(traced, Plan({}), linear="shift,nosuch")
