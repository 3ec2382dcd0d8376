"""Attention over codes and coded linear layers for CUDA: what the schedules compute, as loops on
the processor; nvcc compiles them; on a GPU they run."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rewriter
from codegen import cuda, kit_build
from codegen.build import compile_vm
from codegen.frontend import to_relax
from codegen.host import cuda_devices
from codegen.lower import Lowered, lower
from codegen.schedule import Outcome, schedule
from codegen.target import Target, target_named
from passes.form import form_named
from passes.linear_form import LinearSpec, linear_form_named
from passes.seal import seal
from rewriter.api import Result
from tests.by_hand import Encoder
from tests.linears import kernels as linear_kernels
from tests.targets.gpu_loops import as_loops
from tests.targets.kit_tools import Case, Trial, trial, with_target

GPU = target_named("cuda:sm_90")
needs_nvcc = pytest.mark.skipif(cuda.find_nvcc() is None, reason="nvcc is not installed")


def serial(func: Any, target: Target) -> Outcome:
    done = schedule(func, GPU)
    return replace(done, func=as_loops(done.func))


def made(name: str, case: Case, options: dict[str, Any]) -> Trial:
    """A trial away from thresholds, for a GPU."""
    rng, form = np.random.default_rng(), form_named(name, options)
    while True:
        arrays = trial("exact", case, rng).arrays
        params = {n: p.numpy() for n, p in form.init_params(case.site).items()}
        wide = {n: torch.from_numpy(p).double() for n, p in params.items()}
        t = Trial(form, case, arrays, params)
        q, k = (torch.from_numpy(arrays[n]).double() for n in "qk")
        if form.margin(t.spec, wide, q, k) > 1e-5:
            return with_target(t, kind="gpu")


@pytest.mark.parametrize(
    ("name", "case", "options"),
    [
        ("hamming", Case(B=2, T=37, S=45, H=4, G=2, D=16, E=24), {}),
        ("hamming", Case(T=130, S=130, causal=True, D=16, E=24), {}),  # three chunks
        ("hamming", Case(T=70, S=100, causal=True, H=4, G=2, D=8, E=8, key_rows=1), {"bits": 40}),
        ("hamming", Case(T=37, S=5, causal=True), {}),
        ("hamming", Case(T=70, S=70, causal=True, E=8, key_rows=1), {"constant": "own_value"}),
        ("hamming_table", Case(T=30, S=30, causal=True, key_rows=1), {"bits": 33}),
        ("hamming_table", Case(B=2, T=9, S=40, H=4, G=2), {"quantiser": "sign"}),
        ("shiftadd", Case(T=30, S=30, key_rows=1), {}),
        ("shiftadd", Case(T=20, S=20, H=4, G=2), {"quantiser": "sign"}),
    ],
    ids=str,
)
def test_attention_kernels(
    name: str, case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    t = made(name, case, options)
    monkeypatch.setattr(kit_build, "schedule", serial)
    built = t.build()
    assert {k.scheduled_by for k in built.kernels} == {"gpu_hamming"}
    np.testing.assert_allclose(t.run(built), t.reference(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(
    ("name", "options"),
    [("shift", {}), ("shift", {"bits": 5, "terms": 2}), ("shiftadd_ptq", {"bits": 3})],
)
def test_linear_kernels(
    name: str, options: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = linear_form_named(name, options)
    params = form.convert(torch.randn(70, 45) * 0.1, torch.randn(70))
    spec = LinearSpec(name, 45, 70, True, form.config.to_json())
    packed, x = {**form.pack(params), "bias": params["bias"]}, torch.randn(rows, 45)
    monkeypatch.setattr(linear_kernels, "schedule", serial)
    out, rules = linear_kernels.run(form, spec, packed, x, gpu_kind())
    assert rules == ["gpu_coded"]
    want = x.double() @ form.weight(params).double().T + params["bias"].double()
    assert (out.double() - want).abs().max() < 1e-5 * want.abs().max()


def gpu_kind() -> Target:
    """This machine as if it were a GPU: the kernels are then those for CUDA."""
    return replace(target_named("cpu"), kind="gpu")


class Decoder(nn.Module):
    """Causal self attention and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.a, self.b))
        y = nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)
        return self.d(torch.relu(self.c(y.transpose(1, 2).flatten(2))))


WAYS = [
    "hamming",
    "hamming, both ways",
    "hamming_table",
    "shiftadd",
    "shift",
    "shiftadd_ptq",
    "moe",
]


def rewritten(way: str) -> tuple[Result, dict[str, torch.Tensor]]:
    """A tiny model with codes in it, and inputs."""
    linear = way if way.split(":")[0] in ("shift", "shiftadd_ptq", "moe") else None
    form = "exact" if linear else way
    form, both = form.split(",")[0], way in ("shiftadd", "hamming, both ways")
    model: nn.Module = Encoder() if both else Decoder()
    inputs = {"x": torch.randn(2, 33, 16 if both else 32)}
    return rewriter.rewrite(model.eval(), inputs, form=form, linear=linear), inputs


def lowered(way: str) -> Lowered:
    return lower(to_relax(seal(rewritten(way)[0].rewritten), GPU), GPU)


@needs_nvcc
@pytest.mark.parametrize("way", WAYS)
def test_nvcc_compiles_them(way: str, tmp_path: Path) -> None:
    result = lowered(way)
    assert all(k.scheduled_by.startswith("gpu_") for k in result.kernels)
    used = {k.scheduled_by for k in result.kernels}
    assert used & {"gpu_hamming", "gpu_coded", "gpu_dispatch"}
    library = compile_vm(result, GPU).mod
    while library.kind != "cuda":
        (library,) = library.imports
    path = tmp_path / "kernels.cu"
    path.write_text(str(library.inspect_source()))
    command = [str(cuda.find_nvcc()), "-cubin", "-arch=sm_90", "-O1", "-o", str(tmp_path / "k")]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_devices(), reason="no CUDA GPU (or no driver) on this machine")
@needs_nvcc
@pytest.mark.parametrize("way", WAYS)
def test_the_artifact_equals_eager_on_the_gpu(way: str, tmp_path: Path) -> None:
    result, inputs = rewritten(way)
    path = tmp_path / "model.rwa"
    rewriter.compile(result, path=path, target="cuda:sm_90")
    with rewriter.load(path) as artifact:
        (have,) = artifact(inputs["x"].numpy()).values()
    with torch.no_grad():
        np.testing.assert_allclose(have, result.model(**inputs), atol=1e-4, rtol=1e-4)
