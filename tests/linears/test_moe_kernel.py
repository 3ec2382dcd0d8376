"""The compiled layer of two experts: every split, every token once, foreign targets."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from torch import Tensor
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from codegen.kernels import dispatch as kernel
from codegen.schedule import Outcome, schedule
from codegen.target import Target, target_named
from passes.linear_form import LinearSpec
from passes.linear_forms._codes import CodeSpec
from passes.linear_forms.moe import Moe
from tests.linears import kernels as linear_kernels
from tests.linears.kernels import lowered, run, run_many
from tests.targets.gpu_loops import as_loops

SPLITS = ("mixed", "all multiply", "all shift", "one multiply", "one shift")


def made(n: int, k: int, *, bias: bool = True, **config: Any) -> tuple[Moe, dict[str, Tensor]]:
    """A form and its parameters; the router looks at the first input alone."""
    form = Moe(config)
    params = form.convert(torch.randn(n, k) * 0.2, torch.randn(n) if bias else None)
    params["multiply"] = torch.randn(n, k) * 0.2  # the experts differ by more than rounding
    params["router"] = torch.zeros(2, k)
    params["router"][:, 0] = torch.tensor([1.0, -1.0])
    return form, params


def packed_of(form: Moe, params: dict[str, Tensor]) -> tuple[LinearSpec, dict[str, Tensor]]:
    n, k = params["multiply"].shape
    spec = LinearSpec("moe", k, n, "bias" in params, form.config.to_json())
    packed = form.pack(params)
    extra = {"bias": params["bias"]} if "bias" in params else {}
    return spec, {**{name: packed[name] for name in form.packed_names(spec)}, **extra}


def tokens(rows: int, depth: int, split: str) -> Tensor:
    """Inputs [rows, depth] that the router of `made` sends as `split` says."""
    x = torch.randn(rows, depth)
    size = x[:, 0].abs() + 0.1
    at = torch.randint(rows, ()).item()
    if split != "mixed":
        first = split.endswith("multiply")
        one = split.startswith("one")
        x[:, 0] = size if first != one else -size
        if one:
            x[at, 0] = size[at] if first else -size[at]
    return x


def exact(form: Moe, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Both experts in float64, one chosen: the plain meaning."""
    wide = {name: p.double() for name, p in params.items()}
    logits = x.double() @ wide["router"].T
    both = [x.double() @ w.T for w in (wide["multiply"], form.weight(params).double())]
    bias = wide.get("bias", torch.zeros(1))
    out = torch.where(logits[:, 1:] > logits[:, :1], both[1] + bias, both[0] + bias)
    return out * logits.softmax(-1).amax(-1, keepdim=True) if form.config.gate == "value" else out


@pytest.mark.parametrize(
    ("rows", "n", "k", "config"),
    [
        (1, 64, 101, {}),
        (9, 64, 60, {"bits": 5, "bias": False}),
        (37, 70, 101, {"bits": 3, "gate": "value"}),
        (83, 96, 48, {}),
    ],
)
def test_the_kernel_equals_float64_for_every_split(
    rows: int, n: int, k: int, config: dict[str, Any]
) -> None:
    form, params = made(n, k, **config)
    spec, packed = packed_of(form, params)
    inputs = [tokens(rows, k, split) for split in SPLITS]
    for x, (out, rules) in zip(inputs, run_many(form, spec, packed, inputs), strict=True):
        want = exact(form, params, x)
        assert (out.double() - want).abs().max() < 2e-5 * max(1.0, float(want.abs().max()))
        assert rules == ["dispatch"]
        torch.testing.assert_close(form.forward(params, x), out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(form.run_packed(spec, packed, x), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lead", [(2, 3), (4, 16), (40, 1), (2, 1, 5)])
def test_leading_axes(lead: tuple[int, ...]) -> None:
    form, params = made(32, 24)
    spec, packed = packed_of(form, params)
    x = torch.randn(*lead, 24)
    out, _ = run(form, spec, packed, x)
    torch.testing.assert_close(out, form.forward(params, x), rtol=1e-4, atol=1e-5)


def test_equal_logits_and_nan_go_where_torch_sends_them() -> None:
    form, params = made(32, 8)
    params["router"] = torch.zeros(2, 8)
    spec, packed = packed_of(form, params)
    x = torch.randn(12, 8)
    x[3, 2] = float("nan")
    out, _ = run(form, spec, packed, x)
    torch.testing.assert_close(out, x @ params["multiply"].T + params["bias"], equal_nan=True)


def count_instead(
    layer: Any, product: Any, start: Any, width: int, rows: int, index: Any, scale: Any = None
) -> None:
    """In place of a tile's products: one more in each of its outputs, a thousand for shift."""
    for i in range(rows):
        token = layer.order[index + i]
        with T.serial(0, width) as j:
            more = tirx.const(1.0 if scale is None else 1000.0, "float32")
            T.buffer_store(layer.out, layer.out[token, start + j] + more, [token, start + j])


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (8, 32), (61, 96), (61, 70)])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_output_is_computed_once_by_its_own_expert(
    rows: int, columns: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_rows", count_instead)
    form, params = made(columns, 16)
    _, packed = packed_of(form, params)
    target = target_named("cpu")
    given = {name: (tuple(t.shape), str(t.dtype)[6:]) for name, t in packed.items()}
    shapes = {"x": ((rows, 16), "float32"), **given, "out": ((rows, columns), "float32")}
    func = kernel.dispatch(kernel.DispatchFacts(CodeSpec(4), True, False, workers), shapes, target)
    built = tvm.compile(
        tvm.IRModule({"main": func.with_attr("global_symbol", "main")}),
        target=tvm.target.Target(dict(target.tvm)),
    )
    for split in SPLITS:
        x = tokens(rows, 16, split)
        out = tvm.runtime.tensor(np.zeros((rows, columns), np.float32))
        built(*(tvm.runtime.tensor(t.numpy()) for t in (x, *packed.values())), out)
        choice = form.logits(params, x).argmax(-1)
        wanted = torch.where(choice == 0, 1.0, 1000.0)[:, None].expand(rows, columns)
        assert torch.equal(torch.from_numpy(out.numpy()), wanted), split


def plain(target: Target) -> Target:
    """`target` as a processor with short vectors."""
    return dataclasses.replace(target, features=(), vector_bytes=16, vector_registers=16)


@pytest.mark.parametrize("columns", [20, 64])
def test_short_vectors(columns: int) -> None:
    form, params = made(columns, 40, bits=5)
    spec, packed = packed_of(form, params)
    x = torch.randn(21, 40)
    out, rules = run(form, spec, packed, x, plain(target_named("cpu")))
    torch.testing.assert_close(out, form.forward(params, x), rtol=1e-4, atol=1e-5)
    assert rules == ["dispatch"]


def test_code_is_made_for_a_foreign_processor() -> None:
    target = target_named("edge:cortex-a72")
    form, params = made(64, 40)
    spec, packed = packed_of(form, params)
    mod = lowered(form, spec, packed, (21, 40), target)
    (func,) = (f for g, f in mod.functions_items() if g.name_hint == "two_experts")
    done = schedule(func, target)
    assert done.rule == "dispatch"
    named = done.func.with_attr("global_symbol", "two_experts")
    code = tvm.compile(tvm.IRModule({"two_experts": named}), target=dict(target.tvm))
    assert "fmla" in code.mod.inspect_source("asm")


def as_gpu_loops(func: Any, target: Target) -> Outcome:
    """The schedule for a GPU, as loops that run here."""
    done = schedule(func, target_named("cuda:sm_90"))
    return dataclasses.replace(done, func=as_loops(done.func))


@pytest.mark.parametrize(
    ("rows", "n", "k", "config"),
    [(1, 64, 101, {}), (9, 70, 60, {"bits": 5, "gate": "value"}), (37, 32, 45, {"bits": 3})],
)
def test_the_kernel_for_a_gpu_equals_float64_for_every_split(
    rows: int, n: int, k: int, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    form, params = made(n, k, bias=rows != 9, **config)
    spec, packed = packed_of(form, params)
    inputs = [tokens(rows, k, split) for split in SPLITS]
    monkeypatch.setattr(linear_kernels, "schedule", as_gpu_loops)
    target = dataclasses.replace(target_named("cpu"), kind="gpu")
    for x, (out, rules) in zip(inputs, run_many(form, spec, packed, inputs, target), strict=True):
        want = exact(form, params, x)
        assert (out.double() - want).abs().max() < 2e-5 * max(1.0, float(want.abs().max()))
        assert rules == ["gpu_dispatch"]
