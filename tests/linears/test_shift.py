"""shift: what the codes stand for, conversion, training, and the packed kernels."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from codegen.schedule import schedule
from codegen.target import target_named
from passes.errors import FormError, RewriterError, UsageError
from passes.linear_form import LinearSpec, linear_form_named, linear_forms
from passes.linear_forms._codes import CodeSpec, nearest, pack, unpack, value_of
from passes.linear_forms.shift import Shift
from tests.linears.kernels import counted, lowered, run, run_many

SPECS = [CodeSpec(3), CodeSpec(4), CodeSpec(5), CodeSpec(5, 2)]
ids = [s.key for s in SPECS]


def layer(
    form: Shift, n: int, k: int, *, bias: bool = True, spread: float = 0.05
) -> tuple[LinearSpec, dict[str, Tensor]]:
    weight = torch.randn(n, k) * spread * torch.rand(n, 1)
    params = form.convert(weight, torch.randn(n) if bias else None)
    return LinearSpec("shift", k, n, bias, form.config.to_json()), params


def packed_of(form: Shift, params: dict[str, Tensor]) -> dict[str, Tensor]:
    packed = form.pack(params)
    return {**packed, **({"bias": params["bias"]} if "bias" in params else {})}


@pytest.mark.parametrize("codes", SPECS, ids=ids)
def test_codes_survive_packing_and_stand_for_signed_sums_of_powers(codes: CodeSpec) -> None:
    made = torch.randint(0, 1 << codes.bits, (37, 53))
    words = pack(made, codes)
    assert words.dtype == torch.int32
    assert words.shape == (2, -(-53 // codes.per), 32)
    assert torch.equal(unpack(words, codes, (37, 53)), made)
    assert len(codes.values()) == 1 << codes.bits
    for value in codes.magnitudes()[1:]:
        ones = bin(int(value * 2**20)).count("1")
        assert 1 <= ones <= codes.terms
        assert value < 2


@pytest.mark.parametrize("codes", SPECS, ids=ids)
def test_rounding_takes_the_nearest_level(codes: CodeSpec) -> None:
    weight = torch.randn(40, 60, dtype=torch.float64) * 0.4
    value = value_of(nearest(weight, codes), codes, torch.float64)
    levels = torch.tensor(sorted(set(codes.values())), dtype=torch.float64)
    if codes.terms == 2:
        best = levels[(weight[..., None] - levels).abs().argmin(-1)]
        assert torch.equal(value.abs(), best.abs())
    else:
        some = value != 0
        ratio = (weight[some] / value[some]).log2()
        inside = weight[some].abs() < math.sqrt(2)
        lowest = value[some].abs() == levels[levels > 0].min()
        assert (ratio[inside & ~lowest].abs() <= 0.5 + 1e-12).all()
    assert torch.equal(nearest(torch.zeros(3, 4), codes), torch.zeros(3, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("codes", "rows"),
    [(CodeSpec(4), 1), (CodeSpec(4), 3), (CodeSpec(4), 33), (CodeSpec(3), 1), (CodeSpec(5), 8),
     (CodeSpec(5), 1), (CodeSpec(5, 2), 1), (CodeSpec(5, 2), 3), (CodeSpec(5, 2), 9)],
)  # fmt: skip
def test_kernels_equal_a_float64_product(codes: CodeSpec, rows: int) -> None:
    form = Shift({"bits": codes.bits, "terms": codes.terms})
    spec, params = layer(form, n=70, k=101)
    packed, x = packed_of(form, params), torch.randn(rows, 101)
    out, rules = run(form, spec, packed, x)
    exact = x.double() @ form.weight(params).double().T + params["bias"].double()
    assert out.shape == (rows, 70)
    assert (out.double() - exact).abs().max() < 1e-5 * exact.abs().max()
    assert rules == ["coded_rows" if rows <= 8 else "dense"]
    torch.testing.assert_close(form.forward(params, x), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("codes", "rows"), [(CodeSpec(4), 1), (CodeSpec(5, 2), 2), (SPECS[0], 6)])
def test_panels_side_by_side(codes: CodeSpec, rows: int) -> None:
    form = Shift({"bits": codes.bits, "terms": codes.terms})
    spec, params = layer(form, n=256, k=64, bias=False)
    x = torch.randn(rows, 64)
    out, rules = run(form, spec, packed_of(form, params), x)
    exact = x.double() @ form.weight(params).double().T
    assert (out.double() - exact).abs().max() < 1e-5 * exact.abs().max()
    assert rules == ["coded_rows"]


def test_threads_share_many_rows_of_few_columns() -> None:
    form, target = Shift(), dataclasses.replace(target_named("cpu"), threads=2)
    spec, params = layer(form, n=30, k=24)
    packed, x = packed_of(form, params), torch.randn(1040, 24)
    made = lowered(form, spec, packed, (1040, 24), target)
    func = next(f for g, f in made.functions_items() if g.name_hint == "coded_linear")
    assert "T.parallel(T.int64(2))" in schedule(func, target).func.script()
    out, _ = run(form, spec, packed, x, target)
    exact = x.double() @ form.weight(params).double().T + params["bias"].double()
    assert (out.double() - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("name", ["cpu", "edge:cortex-a72"])
def test_kernels_are_scheduled_without_the_processors_tables_too(name: str) -> None:
    made = target_named(name)
    plain = dataclasses.replace(made, features=(), vector_bytes=16) if name == "cpu" else made
    form = Shift({"bits": 4})
    spec, params = layer(form, n=96, k=200)
    for rows in (1, 3):
        x = torch.randn(rows, 200)
        if name == "cpu":
            out, rules = run(form, spec, packed_of(form, params), x, plain)
            torch.testing.assert_close(out, form.forward(params, x), rtol=1e-4, atol=1e-5)
            assert rules == ["coded_rows"]
        else:
            mod = lowered(form, spec, packed_of(form, params), (rows, 200))
            func = next(f for g, f in mod.functions_items() if g.name_hint == "coded_linear")
            assert schedule(func, plain).rule == "coded_rows"


@pytest.mark.parametrize("lead", [(2, 3), (4, 16), (40, 1)])
def test_leading_axes(lead: tuple[int, ...]) -> None:
    form = Shift({"bits": 5})
    spec, params = layer(form, n=32, k=24, bias=False)
    x = torch.randn(*lead, 24)
    out, _ = run(form, spec, packed_of(form, params), x)
    torch.testing.assert_close(out, form.forward(params, x), rtol=1e-4, atol=1e-5)


def test_one_row_is_exact_shifts_and_keeps_what_is_not_finite() -> None:
    form = Shift({"bits": 4, "base": "one"})
    params = form.convert(torch.tensor([[0.25], [-1.0], [0.0], [1 / 64]]), None)
    spec = LinearSpec("shift", 1, 4, False, form.config.to_json())
    packed = form.pack(params)
    values = (1.7, -3e-30, 0.0, 2e38, 1.2e-38, math.inf, math.nan)
    for value, (out, _) in zip(
        values, run_many(form, spec, packed, [torch.tensor([[v]]) for v in values]), strict=True
    ):
        exact = torch.tensor([0.25, -1.0, 0.0, 1 / 64]) * torch.tensor(value)
        # Below the smallest normal number a product is 0, or what a multiply-add keeps of it.
        small = (exact.abs() < torch.finfo(torch.float32).tiny) & (out[0] == 0)
        right = torch.where(small, 0.0, exact) + 0.0
        torch.testing.assert_close(out[0] + 0.0, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("codes", SPECS, ids=ids)
def test_operations_are_those_of_the_kernel(codes: CodeSpec, rows: int) -> None:
    form = Shift({"bits": codes.bits, "terms": codes.terms})
    spec, params = layer(form, n=64, k=60 if codes.bits != 4 else 64)
    made = counted(form, spec, packed_of(form, params), rows)
    index = {("mul", "int64"), ("mul", "int32")}  # positions in a word: constants once unrolled
    assert {k: v for k, v in made.ops.items() if k not in index} == dict(form.ops(spec, rows).ops)
    if rows == 1:  # the powers of two of the outputs; none of the products
        assert made.ops[("mul", "float32")] == spec.outputs
    assert made.bytes_read == form.ops(spec, rows).bytes_read
    assert made.bytes_written == form.ops(spec, rows).bytes_written


@pytest.mark.parametrize("config", [{}, {"bits": 5}, {"bits": 5, "terms": 2}, {"train": "ps"}])
def test_straight_through_training_learns(config: dict[str, Any]) -> None:
    form = Shift(config)
    _, params = layer(form, n=12, k=20, spread=0.3)
    trained = {n: p.requires_grad_(n not in form.frozen) for n, p in params.items()}
    x = torch.randn(256, 20)
    target = x @ (torch.randn(12, 20) * 0.2).T
    optimiser = torch.optim.Adam([p for p in trained.values() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(90):
        loss = (form.forward(trained, x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    weight = form.weight(trained).detach()
    spec = LinearSpec("shift", 20, 12, True, form.config.to_json())
    assert torch.equal(form.unpack(spec, form.pack(trained)), weight.float())


def test_ps_and_q_convert_to_the_same_weight() -> None:
    weight = torch.randn(9, 33) * 0.1
    q, ps = Shift({"bits": 4}), Shift({"bits": 4, "train": "ps"})
    one, other = (f.weight(f.convert(weight, None)) for f in (q, ps))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_the_published_range_and_zeros() -> None:
    form = Shift({"bits": 5, "base": "one"})
    weight = form.weight(form.convert(torch.tensor([[3.0, -0.7, 2.0**-14, 0.0, 1e-9]]), None))
    assert weight.tolist() == [[1.0, -0.5, 2.0**-14, 0.0, 0.0]]
    zeros = Shift({"bits": 4}).convert(torch.zeros(3, 8), torch.ones(3))
    spec = LinearSpec("shift", 8, 3, True, {})
    out, _ = run(Shift(), spec, packed_of(Shift(), zeros), torch.randn(2, 8))
    assert torch.equal(out, torch.ones(2, 3))


def test_more_bits_and_terms_are_nearer() -> None:
    weight = torch.randn(64, 256) * 0.005
    errors = []
    for config in ({"bits": 3}, {"bits": 4}, {"bits": 5, "terms": 2}):
        form = Shift(config)
        errors.append(float((form.weight(form.convert(weight, None)) - weight).norm()))
    assert errors[0] > errors[1] > 2 * errors[2]
    row, one = (Shift({"bits": 4, "base": b}) for b in ("row", "one"))
    gap = [float((f.weight(f.convert(weight, None)) - weight).norm()) for f in (row, one)]
    assert gap[0] < 0.7 * gap[1]


def test_fixed_point_activations() -> None:
    form = Shift({"activations": "fixed"})
    spec, params = layer(form, n=16, k=40)
    x = torch.randn(3, 40)
    out, _ = run(form, spec, packed_of(form, params), x)
    rounded = torch.floor(x.double() * 65536) / 65536
    exact = rounded @ form.weight(params).double().T + params["bias"].double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(form.inputs(torch.tensor([1e9, -1e9])), torch.tensor([32767.0, -32768.0]))


@pytest.mark.parametrize(
    "config",
    [{"bits": 2}, {"bits": 6}, {"bits": "4"}, {"terms": 2}, {"train": "x"}, {"base": 3},
     {"activations": "int"}, {"bits": 5, "terms": 2, "train": "ps"}, {"bit": 4}],
)  # fmt: skip
def test_bad_options_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Shift(config)


def test_bad_weights_and_names_are_refused() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(FormError, match="not finite"):
            Shift().convert(torch.tensor([[1.0, value]]), None)
    assert "shift" in linear_forms()
    with pytest.raises(RewriterError, match="shift"):
        linear_form_named("shifted")
