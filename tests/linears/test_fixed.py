"""shift in int32 fixed point: digit for digit, without a float inside, and it can not overflow."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tvm import tirx

import rewriter
from codegen.schedule import schedule
from codegen.target import target_named
from passes.errors import FormError, UsageError
from passes.linear_form import LinearSpec
from passes.linear_forms._fixed import TOP, levels
from passes.linear_forms.shift import Shift
from tests.linears.kernels import counted, lowered, run
from tests.targets.test_kit_hamming import walk

CONFIGS: list[dict[str, Any]] = [{}, {"bits": 3}, {"bits": 5}, {"bits": 5, "terms": 2}]


def layer(
    options: dict[str, Any], n: int = 70, k: int = 101, size: float = 0.05
) -> tuple[Shift, LinearSpec, dict[str, Tensor], dict[str, Tensor]]:
    """(form, spec, parameters, packed tensors) of a random layer with a bias."""
    form = Shift({"activations": "integer", **options})
    params = form.convert(torch.randn(n, k) * size * torch.rand(n, 1), torch.randn(n))
    spec = LinearSpec("shift", k, n, True, form.config.to_json())
    return form, spec, params, {**form.pack(params), "bias": params["bias"]}


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_the_kernel_is_the_reference_digit_for_digit(options: dict[str, Any], rows: int) -> None:
    form, spec, params, packed = layer(options)
    x = torch.randn(rows, 101)
    out, rules = run(form, spec, packed, x)
    assert "fixed_rows" in rules
    assert torch.equal(out, form.run_packed(spec, packed, x))
    assert torch.equal(out, form.forward(params, x))
    made = dict(counted(form, spec, packed, rows).ops)
    made.pop(("mul", "int64"), None)  # positions in a word: constants once unrolled
    assert made == dict(form.ops(spec, rows).ops)


@pytest.mark.parametrize("options", [*CONFIGS, {"fraction": 8}, {"fraction": 20}], ids=str)
def test_the_error_against_floats_is_within_its_bound(options: dict[str, Any]) -> None:
    """Every product and every activation loses less than one unit, the sum's shift one more."""
    form, spec, params, packed = layer(options)
    x = torch.randn(40, 101)
    weight = form.weight(params).double()
    want = x.double() @ weight.T + params["bias"].double()
    error = (form.run_packed(spec, packed, x.double()) - want).abs()
    unit = 2.0**-form.config.fraction
    losses = 101 * form.config.terms * torch.exp2(params["base"].double())
    assert (error <= (losses + weight.abs().sum(1) + 2) * unit).all()
    assert error.max() > 0


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_sums_can_not_leave_int32(options: dict[str, Any]) -> None:
    """The worst inputs there are, in the kernel: what wraps would differ from the reference."""
    form, spec, _, packed = layer(options, n=33, k=40, size=3.0)
    weight = form.unpack(spec, packed)
    worst = torch.cat([weight.sign(), -weight.sign()]) * 1e30
    out, _ = run(form, spec, packed, worst[:8])
    assert torch.equal(out, form.run_packed(spec, packed, worst[:8]))
    whole = form.run_packed(spec, packed, worst.double()) * 2.0**form.config.fraction
    assert TOP / 8 < whole.abs().max() <= TOP
    low, high = torch.full((1, 40), -math.inf), torch.full((1, 40), math.nan)
    for x in (low, high):  # infinities are the limit, NaN is 0
        out, _ = run(form, spec, packed, x)
        assert torch.equal(out, form.run_packed(spec, packed, x))
        assert out.isfinite().all()


@pytest.mark.parametrize("target", ["cpu", "edge:cortex-a72"])
def test_no_floating_operation_is_inside(target: str) -> None:
    """Every statement and expression of the scheduled product is of an integer (or truth) type."""
    form, spec, _, packed = layer({})
    for rows in (1, 6):
        mod = lowered(form, spec, packed, (rows, 101), target_named(target))
        funcs = {g.name_hint: f for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)}
        done = schedule(funcs["fixed_linear"], target_named(target))
        assert done.rule == "fixed_rows"
        assert [str(p.dtype) for p in done.func.params] == ["int32"] * 5
        nodes = list(walk(done.func.body))
        assert sum(type(n).__name__ == "BufferStore" for n in nodes) >= 3
        assert not [n for n in nodes if "float" in str(getattr(n, "ty", ""))]
        assert "float" not in str(done.func)
        # The walk does see floats where they are.
        other = list(walk(funcs["to_fixed"].body))
        assert [n for n in other if "float" in str(getattr(n, "ty", ""))]
        products = [n for n in nodes if type(n).__name__ == "Mul" and depends_on_load(n)]
        assert not products


def depends_on_load(node: Any) -> bool:
    """Whether a value from memory is among what `node` is made of (index arithmetic has none)."""
    return any(type(n).__name__ == "BufferLoad" for n in walk(node))


def test_narrow_vectors_give_the_same() -> None:
    form, spec, _, packed = layer({"bits": 5})
    plain = dataclasses.replace(target_named("cpu"), features=(), vector_bytes=16)
    x = torch.randn(5, 101)
    out, _ = run(form, spec, packed, x, plain)
    assert torch.equal(out, form.run_packed(spec, packed, x))


def test_levels_are_the_values_of_the_codes() -> None:
    for options in CONFIGS:
        codes = Shift(options).codes
        made = [sum(s[c] * 2.0**-p for p, s in levels(codes)) for c in range(1 << codes.bits)]
        assert made == codes.values()


def test_gradients_are_those_of_the_float_product() -> None:
    form, _, params, _ = layer({})
    trained = {n: p.clone().requires_grad_(n not in form.frozen) for n, p in params.items()}
    x = torch.randn(4, 101, requires_grad=True)
    form.forward(trained, x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    assert trained["weight"].grad is not None
    assert trained["weight"].grad.abs().max() > 0


def test_zeros_and_what_is_refused() -> None:
    form = Shift({"activations": "integer"})
    zeros = form.convert(torch.zeros(3, 8), torch.ones(3))
    spec = LinearSpec("shift", 8, 3, True, form.config.to_json())
    packed = {**form.pack(zeros), "bias": zeros["bias"]}
    out, _ = run(form, spec, packed, torch.randn(2, 8))
    assert torch.equal(out, torch.ones(2, 3))
    with pytest.raises(FormError, match="weight has values that are not finite"):
        form.convert(torch.tensor([[1.0, math.inf]]), None)
    weight = form.convert(torch.randn(2, 8), torch.tensor([0.0, math.nan]))
    with pytest.raises(FormError, match="bias has values that are not finite"):
        form.pack(weight)
    with pytest.raises(FormError, match="bias of 1e\\+06 does not fit"):
        form.pack(form.convert(torch.randn(2, 8), torch.tensor([0.0, 1e6])))
    fine = Shift({"activations": "integer", "fraction": 24})
    with pytest.raises(FormError, match="use a smaller fraction"):
        fine.pack(fine.convert(torch.ones(2, 4000), None))
    for wrong in (3, 25, 16.0, True, "16"):
        with pytest.raises(UsageError, match="fraction"):
            Shift({"activations": "integer", "fraction": wrong})


class Attention(nn.Module):
    """Attention between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.a(x)[:, None], self.b(x)[:, None]
        y = nn.functional.scaled_dot_product_attention(q, k, k)[:, 0]
        return self.d(torch.relu(self.c(y)))


def test_a_model_is_compiled_with_integers(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 32)
    result = rewriter.rewrite(Attention().eval(), (x,), linear="shift:activations=integer:bits=5")
    artifact = rewriter.compile(result, path=tmp_path / "m.rwa")
    assert any("fixed_linear" in k["name"] for k in artifact.report["kernels"])
    (out,) = artifact(x.numpy()).values()
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(out), result.model(x), rtol=0, atol=1e-3)
