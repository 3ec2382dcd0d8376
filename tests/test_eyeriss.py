"""The accelerator model of ShiftAddViT: layers, whole models, and the released script's defects."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest

from codegen.eyeriss import Estimate, Kind, Nest, estimate, factors
from passes.linear_form import linear_form_named
from passes.plan import Plan, plan_by_rules
from rewriter.energy import EnergyReport, energy_report
from tests.by_hand import Encoder
from tests.test_energy import stock

DIMS, HEADS, RATIOS = (32, 64, 160, 256), (1, 2, 5, 8), (8, 8, 4, 4)
NOTHING = Estimate(0.0, 0.0, 0.0)


@functools.cache
def priced(form: str, model: str) -> EnergyReport:
    """PVT v2 B0 at 224 pixels."""
    traced, found = stock("B0")
    plan = plan_by_rules(found.sites, {"*": form}) if form else Plan({})
    return energy_report(traced, plan, model=model)


def test_one_layer_by_the_source() -> None:
    """3136 x 32 -> 256: mostly traffic, and a shift moves ten bits of 32."""
    full, shift = (estimate(Nest(3136, 256, 32, kind=k)) for k in (Kind.MULTIPLY, Kind.SHIFT))
    assert full.energy_mj == pytest.approx(1.3416, abs=5e-5)
    assert full.arithmetic_mj == pytest.approx(0.095, abs=5e-4)
    assert shift.energy_mj == pytest.approx(0.3929, abs=5e-5)
    assert shift.arithmetic_mj == pytest.approx(0.0033, abs=5e-5)
    assert shift.latency_ms == pytest.approx(full.latency_ms * 10 / 32)
    first_add = estimate(Nest(16, 32, 3136, kind=Kind.ADD))
    assert first_add.energy_mj == pytest.approx(0.0371, abs=5e-5)


def dense(rows: int, outputs: int, inputs: int, kind: Kind = Kind.MULTIPLY) -> Estimate:
    return estimate(Nest(rows, outputs, inputs, kind=kind))


def blocks(attention: Any, mlp: Any = dense) -> Estimate:
    """PVT v2 B0 by hand: embeddings, MLPs, head, and attention(stage, tokens, width, heads)."""
    total, side, last = NOTHING, 224, 3
    for stage, (c, heads) in enumerate(zip(DIMS, HEADS, strict=True)):
        kernel, stride = (7, 4) if stage == 0 else (3, 2)
        out, wide = side // stride, RATIOS[stage] * c
        total += estimate(Nest(1, c, last, out, out, kernel, kernel, side, side, stride))
        n, side, last = out * out, out, c
        block = attention(stage, n, c, heads)
        block += mlp(n, wide, c) + mlp(n, c, wide)
        block += estimate(Nest(wide, 1, 1, out, out, 3, 3, out, out))
        total += block * 2
    return total + estimate(Nest(1, 1000, 256))


def softmax(stage: int, n: int, c: int, heads: int, *, seen: bool = True) -> Estimate:
    total = estimate(Nest(n, 3 * c, c)) + estimate(Nest(n, c, c))
    if seen:
        d = c // heads
        total += estimate(Nest(heads * n, n, d)) + estimate(Nest(heads * n, d, n))
    return total


def additions(stage: int, n: int, c: int, heads: int, *, kind: Kind = Kind.MULTIPLY) -> Estimate:
    if stage == 3:
        return softmax(stage, n, c, heads)
    d = c // heads
    total = estimate(Nest(n, c, c, kind=kind)) * 3 + estimate(Nest(heads, 1, 1, n, d, 3, 3, n, d))
    read = Nest(heads * n, d, 16, kind=Kind.ADD)
    return total + estimate(Nest(heads * 16, d, n, kind=Kind.ADD)) + estimate(read)


@pytest.mark.parametrize(
    ("made", "energy", "arithmetic", "latency"),
    [
        (lambda: blocks(softmax), 102.86, 7.356, 61.67),
        (lambda: blocks(functools.partial(softmax, seen=False)), 28.28, 2.016, 16.08),
        (lambda: blocks(additions), 28.25, 1.963, None),
        (lambda: blocks(functools.partial(additions, kind=Kind.SHIFT)), 25.79, 1.718, None),
        (lambda: blocks(functools.partial(additions, kind=Kind.SHIFT),
                        functools.partial(dense, kind=Kind.SHIFT)), 14.555, 0.514, None),
    ],
)  # fmt: skip
def test_whole_models_by_the_source(
    made: Any, energy: float, arithmetic: float, latency: float | None
) -> None:
    total = made()
    assert total.energy_mj == pytest.approx(energy, abs=6e-3)
    assert total.arithmetic_mj == pytest.approx(arithmetic, abs=6e-4)
    assert latency is None or total.latency_ms == pytest.approx(latency, abs=6e-3)


def test_the_graph_gives_the_same_model() -> None:
    """The traced model has three projections where the source has one packed one."""
    by_hand = blocks(softmax)
    for stage, c in enumerate(DIMS):
        n = (56 >> stage) ** 2
        by_hand += (estimate(Nest(n, c, c)) * 3 + estimate(Nest(n, 3 * c, c)) * -1) * 2
    cost = priced("msa", "eyeriss").after
    assert cost.energy_mj == pytest.approx(by_hand.energy_mj, rel=1e-9)
    assert cost.latency_ms == pytest.approx(by_hand.latency_ms, rel=1e-9)
    assert cost.arithmetic_mj == pytest.approx(7.356, abs=6e-4)


def test_defects_of_the_released_script() -> None:
    full, seen = priced("msa", "eyeriss").after, priced("msa", "eyeriss-released").after
    assert seen.arithmetic_mj == pytest.approx(2.016, abs=6e-4)  # no product of attention
    assert seen.energy_mj < 0.3 * full.energy_mj
    ours, theirs = (priced("hamming", m) for m in ("eyeriss", "eyeriss-released"))
    rows = {x.name: x.after for x in theirs.layers if x.form == "hamming" and x.after}
    assert len(rows) == 6
    first = estimate(Nest(16, 32, 3136, kind=Kind.ADD)).energy_mj
    assert all(cost.energy_mj == pytest.approx(2 * first) for cost in rows.values())
    honest = {x.name: x.after for x in ours.layers if x.form == "hamming" and x.after}
    assert len({round(c.energy_mj, 6) for c in honest.values()}) == 3
    assert all(c.ops.total("mul") > 0 for c in honest.values())  # hashing multiplies


def test_layers_add_up() -> None:
    data = priced("shiftadd", "eyeriss").to_json()
    for key in ("energy_mj", "arithmetic_mj", "latency_ms"):
        parts = [x["after"][key] for x in data["layers"] if x["after"]]
        assert sum(parts) == pytest.approx(data["after"][key])
    assert all(isinstance(data["after"][k], int) for k in ("mul", "add", "shift", "popcount"))


def test_forms_without_a_nest_are_named() -> None:
    import torch

    from rewriter.api import find_sites

    traced, found = find_sites(Encoder().eval(), {"x": torch.randn(1, 40, 16)})
    made = energy_report(traced, plan_by_rules(found.sites, {"*": "elu"}), model="eyeriss")
    assert made.notes == ("no data movement is modelled for the form elu",)
    site = next(x for x in made.layers if x.form == "elu")
    assert site.after is not None
    assert site.after.energy_mj == site.after.arithmetic_mj > 0


def test_a_kernel_as_large_as_the_array_is_a_product_of_patches() -> None:
    import torch
    from torch import nn

    from rewriter.api import find_sites

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.body = nn.Conv2d(3, 16, 16, 16), Encoder()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens: torch.Tensor = self.body(self.cut(x).flatten(2).transpose(1, 2))
            return tokens

    traced, _ = find_sites(Patches().eval(), {"x": torch.randn(1, 3, 64, 64)})
    made = energy_report(traced, Plan({}), model="eyeriss")
    cut = next(x for x in made.layers if x.name == "cut")
    assert cut.after is not None
    assert cut.after.energy_mj == estimate(Nest(16, 16, 3 * 16 * 16)).energy_mj


@pytest.mark.parametrize(("n", "parts"), [(1, 3), (12, 2), (36, 4), (3136, 2)])
def test_factors(n: int, parts: int) -> None:
    found = factors(n, parts)
    assert len(set(found)) == len(found)
    assert all(math.prod(f) == n and len(f) == parts for f in found)
    if parts == 2:
        assert len(found) == sum(n % d == 0 for d in range(1, n + 1))


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="fits the array in no way"):
        estimate(Nest(1, 8, 8, 8, 8, 13, 13, 16, 16))


def mixture(stage: int, n: int, c: int, heads: int) -> Estimate:
    """Three mixed layers of attention, six tokens of ten to the shifts, and the sums of codes."""
    if stage == 3:
        return softmax(stage, n, c, heads)
    d = c // heads
    total = mixed(n, c, c) * 3 + estimate(Nest(heads, 1, 1, n, d, 3, 3, n, d))
    read = Nest(heads * n, d, 16, kind=Kind.ADD)
    return total + estimate(Nest(heads * 16, d, n, kind=Kind.ADD)) + estimate(read)


def mixed(rows: int, outputs: int, inputs: int) -> Estimate:
    first = round(0.4 * rows)
    total = estimate(Nest(rows, 2, inputs)) + estimate(Nest(first, outputs, inputs))
    return total + estimate(Nest(rows - first, outputs, inputs, kind=Kind.SHIFT))


@pytest.mark.parametrize("linear", ["shift", "moe"])
def test_shift_layers_and_mixtures_of_the_graph(linear: str) -> None:
    """The traced model against one by hand: layers of attention by `linear` in three stages."""
    traced, found = stock("B0")
    form = linear_form_named(linear, {"latencies": [6, 4]} if linear == "moe" else {})
    made = energy_report(
        traced, plan_by_rules(found.sites, {"*": "shiftadd"}), model="eyeriss",
        linear={"pvt_v2.encoder.layers.[012].*.attention.*": form},
    )  # fmt: skip
    by_hand = blocks(mixture if linear == "moe" else functools.partial(additions, kind=Kind.SHIFT))
    for stage, (c, heads) in enumerate(zip(DIMS, HEADS, strict=True)):
        n = (56 >> stage) ** 2
        if stage == 3:  # three projections where the source has one
            by_hand += (estimate(Nest(n, c, c)) * 3 + estimate(Nest(n, 3 * c, c)) * -1) * 2
        else:  # hashing, which the source leaves out
            hashes = estimate(Nest(heads * n, 25, c // heads)) + estimate(Nest(heads * n, 16, 25))
            by_hand += hashes * 2
    assert made.after.energy_mj == pytest.approx(by_hand.energy_mj, rel=1e-9)
    assert made.after.latency_ms == pytest.approx(by_hand.latency_ms, rel=1e-9)
    assert made.after.energy_mj < priced("shiftadd", "eyeriss").after.energy_mj
    assert made.after.ops.total("shift") > 0


def test_a_mixture_of_all_layers_by_the_source() -> None:
    """Published shares, attention and MLP: 22.93 mJ with six tokens of ten to the shifts."""
    total = blocks(mixture, mlp=mixed)
    assert total.energy_mj == pytest.approx(22.93, abs=6e-3)
    assert total.arithmetic_mj == pytest.approx(1.126, abs=6e-4)


def test_a_linear_form_without_a_nest_moves_data_as_a_shift_layer() -> None:
    traced, _ = stock("B0")
    layer = "pvt_v2.encoder.layers.0.blocks.0.mlp.dense1"
    made = energy_report(traced, Plan({}), model="eyeriss", linear=f"shiftadd_ptq,{layer}")
    told = "the form shiftadd_ptq is taken to move data as a shift layer does"
    assert made.notes[-1] == told
    cost = next(x.after for x in made.layers if x.name == layer)
    shift = estimate(Nest(3136, 256, 32, kind=Kind.SHIFT))
    assert cost is not None
    assert cost.arithmetic_mj is not None
    moved = cost.energy_mj - cost.arithmetic_mj
    assert moved == pytest.approx(shift.energy_mj - shift.arithmetic_mj)
    sums = cost.ops.total("add") / (3136 * 256 * 32)
    assert sums == pytest.approx(4 + 8 / 256)  # four bits, and scaling the inputs by three powers
    assert cost.latency_ms == pytest.approx(shift.latency_ms * sums)
