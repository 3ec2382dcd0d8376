"""What the GPU schedules compute, run as serial loops on the CPU (see gpu_loops.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from codegen import kit_build
from codegen.schedule import Outcome, schedule
from codegen.target import Target
from tests.targets import cuda_models
from tests.targets.cuda_models import FORMS, MODELS, TARGET
from tests.targets.gpu_loops import as_loops, module_as_loops
from tests.targets.kit_tools import Case, trial, with_target
from tests.targets.lowering import lowered, run

CASES = [
    Case(B=2, T=37, S=45, H=4, G=2, D=20, E=24),
    Case(T=1, S=19),
    Case(T=70, S=70, D=16, E=40, causal=True),
    Case(T=70, S=200, causal=True, key_rows=1),
    Case(T=37, S=5, causal=True),
    Case(B=2, T=13, S=33, D=80, E=80, key_rows=2),
    Case(T=20, S=20, D=32, E=8, window=(4, 2)),
    Case(T=20, S=31, bias=(1, 2, 20, 31)),
    Case(T=3, S=7001, H=1, G=1, D=8, E=8),  # a row of scores does not fit in shared memory
]


def _serial(func: Any, target: Target) -> Outcome:
    done = schedule(func, TARGET)
    return replace(done, func=as_loops(done.func))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_kernels(form: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU's kernels, which are then compiled as loops for the processor.
    t = with_target(trial(form, case, np.random.default_rng()), kind="gpu")
    verdict = t.form.applies(case.site)
    if not verdict:
        pytest.skip(f"{form} refuses: {verdict}")
    monkeypatch.setattr(kit_build, "schedule", _serial)
    built = t.build()
    assert {k.scheduled_by for k in built.kernels} <= {
        "gpu_attention",
        "gpu_linear_attention",
        "gpu_feature_map",
        "gpu_project",
    }
    np.testing.assert_allclose(t.run(built), t.reference(), atol=2e-5, rtol=0)


class _Fn(nn.Module):
    def __init__(self, fn: Any, *modules: nn.Module) -> None:
        super().__init__()
        self.fn, self.parts = fn, nn.ModuleList(modules)

    def forward(self, *x: torch.Tensor) -> Any:
        return self.fn(*self.parts, *x)


MODULES: list[tuple[str, str, nn.Module, tuple[tuple[int, ...], ...]]] = [
    ("ragged", "gpu_matmul", nn.Sequential(nn.Linear(45, 71), nn.GELU()), ((2, 37, 45),)),
    ("whole", "gpu_matmul", nn.Linear(64, 128), ((128, 64),)),
    ("few rows", "gpu_matmul", nn.Linear(50, 33), ((1, 50),)),
    ("batches", "gpu_matmul", _Fn(torch.matmul), ((3, 17, 20), (3, 20, 9))),
    ("norm", "gpu_rows", nn.LayerNorm(77), ((2, 19, 77),)),
    ("short norm", "gpu_rows", nn.LayerNorm(5), ((13, 5),)),
    ("softmax", "gpu_rows", nn.Softmax(-1), ((3, 11, 50),)),
    ("long softmax", "gpu_rows", nn.Softmax(-1), ((2, 20000),)),
    ("one row", "gpu_rows", nn.Softmax(-1), ((300,),)),
    ("row mean", "gpu_rows", _Fn(lambda x: x.mean(-1)), ((6, 130),)),
    ("columns", "gpu_reduction", _Fn(lambda x: x.sum(1)), ((4, 33, 10),)),
    ("all", "gpu_reduction", _Fn(lambda x: x.sum((0, 1))), ((40, 50),)),
    ("conv", "gpu_reduction", nn.Conv2d(6, 10, 3, stride=2, padding=1), ((2, 6, 15, 13),)),
    ("groups", "gpu_reduction", nn.Conv2d(6, 6, 3, padding=1, groups=6), ((1, 6, 9, 8),)),
    ("patches", "gpu_matmul", nn.Conv2d(3, 20, 4, stride=4), ((2, 3, 18, 16),)),
    ("several", "gpu_elementwise", _Fn(lambda a, b: torch.cat([a * b, b], 1)), ((7, 9), (7, 9))),
    ("scalar", "gpu_elementwise", _Fn(lambda a: a * 2 + 1), ((),)),
]


TOLERANCE = {"all": 2e-4}  # partial sums of 2,000 numbers are as large as 45


@pytest.mark.parametrize(("name", "rule", "module", "shapes"), MODULES, ids=lambda x: str(x)[:12])
def test_other_kernels(
    name: str, rule: str, module: nn.Module, shapes: tuple[tuple[int, ...], ...]
) -> None:
    args = tuple(torch.randn(s) for s in shapes)
    result = lowered(module, args, TARGET)
    assert rule in {k.scheduled_by for k in result.kernels}
    got = run(module_as_loops(result), args)
    with torch.no_grad():
        want = module.double()(*(a.double() for a in args)).numpy()
    module.float()
    np.testing.assert_allclose(got[0], want, atol=TOLERANCE.get(name, 2e-5), rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "form"), [(m, f) for m in MODELS for f in FORMS])
def test_whole_models(model: str, form: str) -> None:
    result = cuda_models.rewritten(model, form)
    got = run(module_as_loops(cuda_models.lowered(model, form)), cuda_models.arrays(result))
    for have, want in zip(got, cuda_models.wanted(result), strict=True):
        np.testing.assert_allclose(have, want, atol=2e-5, rtol=1e-4)
