"""shiftadd_ptq: binary codes from calibration inputs, and their kernels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from codegen.kernels.coded import has_tables
from codegen.target import target_named
from passes.errors import FormError, UsageError
from passes.linear_form import LinearSpec
from passes.linear_forms._binary import fit_alphas, nearest_codes, powers, summed
from passes.linear_forms.shift import Shift
from passes.linear_forms.shiftadd_ptq import ShiftAddPtq
from passes.linears import linear_modules
from tests.linears.kernels import counted, run


def inputs(rows: int, width: int) -> Tensor:
    """Correlated activations of very different sizes, as those of real layers."""
    mix = torch.randn(width // 4, width) + 0.1 * torch.randn(1, width)
    noise = 0.1 * torch.randn(rows, width)
    return (torch.randn(rows, width // 4) @ mix + noise) * torch.rand(width).mul(3).exp()


def error(form: Any, params: dict[str, Tensor], weight: Tensor, x: Tensor) -> float:
    gap = x.double() @ (form.weight(params) - weight).double().T
    return (gap.norm() / (x.double() @ weight.double().T).norm()).item()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_calibration_beats_plain_rounding_of_the_same_codes(bits: int) -> None:
    weight, x = torch.randn(48, 96) * 0.05, inputs(400, 96)
    form = ShiftAddPtq({"bits": bits})
    plain = error(form, form.convert(weight, None), weight, x)
    fitted = error(form, form.convert(weight, None, x), weight, x)
    assert fitted < 0.75 * plain
    if bits >= 3:
        shift = Shift({"bits": bits})
        assert fitted < error(shift, shift.convert(weight, None), weight, x)
    unseen = inputs(200, 96)  # other correlations: no promise, but it must not fall apart
    assert error(form, form.convert(weight, None, x), weight, unseen) < 4 * plain


def test_alphas_are_sums_of_powers_of_two_and_get_better_with_bits() -> None:
    weight = torch.randn(200, 7)
    last = math.inf
    for bits in (1, 2, 3, 4):
        alpha = fit_alphas(weight, bits, 3)
        for value in alpha.flatten().tolist():
            left = value
            for _ in range(3):
                if left:
                    near = 2.0 ** round(math.log2(abs(left)))
                    left -= math.copysign(near, left)
            assert left == 0
        codes = nearest_codes(weight, alpha)
        gap = (summed(codes, alpha) - weight).norm().item()
        assert gap < 0.75 * last
        last = gap
    assert torch.equal(powers(torch.tensor([0.0, 0.75, -3.0]), 2), torch.tensor([0.0, 0.75, -3.0]))


@pytest.mark.parametrize(("bits", "rows"), [(2, 1), (3, 3), (4, 1), (2, 5), (4, 8), (4, 20)])
def test_kernels_equal_a_float64_product(bits: int, rows: int) -> None:
    form = ShiftAddPtq({"bits": bits})
    params = form.convert(torch.randn(70, 101) * 0.1, torch.randn(70), torch.randn(64, 101))
    spec = LinearSpec(form.name, 101, 70, True, form.config.to_json())
    packed = {**form.pack(params), "bias": params["bias"]}
    weight = form.weight(params)
    torch.testing.assert_close(form.unpack(spec, packed), weight)
    x = torch.randn(rows, 101)
    out, rules = run(form, spec, packed, x)
    exact = x.double() @ weight.double().T + params["bias"].double()
    assert (out.double() - exact).abs().max() < 1e-5 * exact.abs().max()
    few = 8 if has_tables(target_named("cpu")) else 4
    assert rules == ["coded_rows" if rows <= few else "dense"]


@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_operations_are_those_of_the_kernel(rows: int) -> None:
    form = ShiftAddPtq({"bits": 4})
    params = form.convert(torch.randn(64, 40), None)
    spec = LinearSpec(form.name, 40, 64, False, form.config.to_json())
    made = counted(form, spec, form.pack(params), rows)
    index = {("mul", "int64"), ("mul", "int32")}
    assert {k: v for k, v in made.ops.items() if k not in index} == dict(form.ops(spec, rows).ops)
    assert made.bytes_read == form.ops(spec, rows).bytes_read


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.a(x)[:, None], self.b(x)[:, None]
        y = nn.functional.scaled_dot_product_attention(q, k, k)[:, 0]
        return self.d(torch.relu(self.c(y)))


def test_a_model_is_calibrated_on_its_own_layers_inputs(tmp_path: Path) -> None:
    model, data = Two().eval(), [{"x": torch.randn(2, 5, 32)} for _ in range(40)]
    result = rewriter.rewrite(
        model, (torch.randn(2, 5, 32),), linear="shiftadd_ptq:bits=3", data=data
    )
    plain = rewriter.rewrite(model, (torch.randn(2, 5, 32),), linear="shiftadd_ptq:bits=3")
    assert set(linear_modules(result.model)) == {"b", "c"}
    assert any("example inputs alone" in note for note in plain.report.notes)
    x = torch.cat([b["x"] for b in data])[:2]
    artifact = rewriter.compile(result, path=tmp_path / "m.rwa")
    (out,) = artifact(x.numpy()).values()
    torch.testing.assert_close(torch.as_tensor(out), result.model(x), rtol=1e-4, atol=1e-5)


def test_bad_input_is_refused_and_zeros_are_not() -> None:
    for wrong in ({"bits": 1}, {"bits": 5}, {"terms": 0}, {"damping": 0}, {"damping": "x"}):
        with pytest.raises(UsageError):
            ShiftAddPtq(wrong)
    form, weight = ShiftAddPtq(), torch.randn(4, 40)
    with pytest.raises(FormError, match="not finite"):
        form.convert(weight * math.inf, None)
    with pytest.raises(FormError, match="calibration"):
        form.convert(weight, None, torch.full((3, 40), math.nan))
    weight[1], x = 0.0, torch.randn(50, 40)
    x[:, 7] = 0.0  # an input that is always off
    made = form.weight(form.convert(weight, None, x))
    assert made.isfinite().all()
    assert (form.weight(form.convert(torch.zeros(3, 8), None, torch.zeros(5, 8))) == 0).all()
