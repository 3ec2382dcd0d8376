"""verify: the comparison is right, its bounds bite, and broken values never pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from codegen.specs import TensorSpec
from passes.errors import UnknownName, VerifyError
from rewriter.verify import (
    TOLERANCES,
    ErrorStats,
    compare_arrays,
    compare_models,
    flat_tensors,
    verify_artifact,
)


def rng() -> np.random.Generator:
    return np.random.default_rng()


def wanted(*shape: int) -> dict[str, Any]:
    return {"y": rng().standard_normal(shape or (3, 5, 8)).astype(np.float32) * 3}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rounding_passes_and_a_wrong_kernel_fails_in_every_dtype(dtype: str) -> None:
    want = wanted(4, 6, 16)
    noise = rng().uniform(-1, 1, want["y"].shape)
    step = {"float64": 1e-15, "float32": 6e-8, "float16": 5e-4, "bfloat16": 4e-3, "int8": 1e-2}
    near = {"y": want["y"] * (1 + 4 * step[dtype] * noise)}
    assert compare_arrays(near, want, dtype=dtype).ok or dtype == "float64"
    swapped = {"y": want["y"][:, ::-1].copy()}
    assert not compare_arrays(swapped, want, dtype=dtype).ok


def test_the_numbers_agree_with_their_definitions() -> None:
    want, diff = wanted(2, 3, 4), rng().uniform(-1e-3, 1e-3, (2, 3, 4))
    got = {"y": want["y"].astype(np.float64) + diff}
    stats = compare_arrays(got, want)
    b = want["y"].astype(np.float64)
    delta = np.abs(got["y"] - b)
    rms = np.sqrt((b**2).mean())
    assert stats.max_abs == pytest.approx(delta.max())
    assert stats.rms_ratio == pytest.approx(np.sqrt((delta**2).mean()) / rms)
    assert stats.max_rel == pytest.approx((delta / (np.abs(b) + rms)).max())
    flat_a, flat_b = got["y"].reshape(-1, 4), b.reshape(-1, 4)
    norms = np.linalg.norm(flat_a, axis=1) * np.linalg.norm(flat_b, axis=1)
    cosines = (flat_a * flat_b).sum(1) / norms
    assert stats.cosine_min == pytest.approx(cosines.min())


def test_the_bound_is_the_line_between_ok_and_not_ok() -> None:
    want = {"y": np.linspace(-0.5, 0.5, 10_000, dtype=np.float64)}
    for factor, ok in ((0.99, True), (1.01, False)):
        got = {"y": want["y"].copy()}
        got["y"][17] += factor * TOLERANCES["float32"].largest
        assert compare_arrays(got, want).ok is ok


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_fails_unless_the_model_has_it_too(bad: float) -> None:
    want = wanted()
    got = {"y": want["y"].copy()}
    got["y"][1, 2, 3] = bad
    stats = compare_arrays(got, want)
    assert not stats.ok
    assert stats.max_abs == np.inf
    assert "not finite" in stats.why
    both = {"y": got["y"].copy()}
    assert compare_arrays(got, both).ok
    assert not compare_arrays(want, both).ok


def test_integers_must_be_equal() -> None:
    want = {"ids": rng().integers(0, 9, (4, 4))}
    assert compare_arrays({"ids": want["ids"].copy()}, want).ok
    off = want["ids"].copy()
    off[0, 0] += 1
    assert not compare_arrays({"ids": off}, want).ok


def test_zeros_and_empty_outputs() -> None:
    zeros = {"y": np.zeros((2, 3), np.float32)}
    assert compare_arrays(zeros, zeros).ok
    assert not compare_arrays({"y": np.full((2, 3), 1e-2, np.float32)}, zeros).ok
    empty = {"y": np.zeros((0, 3), np.float32)}
    assert compare_arrays(empty, empty).ok


def test_the_worst_output_counts() -> None:
    want = {"a": wanted()["y"], "b": wanted()["y"]}
    got = {"a": want["a"], "b": want["b"] + 0.5}
    stats = compare_arrays(got, want)
    assert not stats.ok
    assert "'b'" in stats.why
    assert "'a'" not in stats.why
    with pytest.raises(VerifyError, match="does not agree"):
        stats.require()


def test_names_shapes_and_dtypes_that_do_not_fit_are_errors() -> None:
    want = wanted()
    with pytest.raises(VerifyError, match="outputs differ"):
        compare_arrays({"z": want["y"]}, want)
    with pytest.raises(VerifyError, match="shape"):
        compare_arrays({"y": want["y"][:1]}, want)
    with pytest.raises(VerifyError):
        compare_arrays({}, {})
    with pytest.raises(UnknownName, match="float32"):
        compare_arrays(want, want, dtype="float23")
    assert compare_arrays(want, want, dtype="torch.float32").dtype == "float32"


def test_stats_survive_json() -> None:
    stats = compare_arrays(wanted(), wanted())
    assert ErrorStats.from_json(stats.to_json()) == stats


class Model(nn.Module):
    """Two outputs, one in a dict, as transformers' models return them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
        y = self.layer(x)
        if mask is not None:
            y = y * mask[..., None]
        return {"hidden": y, "extra": (y.mean(1),)}


@dataclass
class NumpyArtifact:
    """Runs the model's formula in numpy: a stand-in for compiled code with the same interface."""

    model: Model
    wrong: float = 0.0
    inputs: list[TensorSpec] = field(default_factory=list)

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        w, b = (p.detach().double().numpy() for p in self.model.layer.parameters())
        y = inputs["x"] @ w.T + b + self.wrong
        if "mask" in inputs:
            y = y * inputs["mask"][..., None]
        return {"out0": y.astype(np.float32), "out1": y.mean(1).astype(np.float32)}


SPECS = [TensorSpec("x", (2, 5, 8), "float32"), TensorSpec("mask", (2, 5), "int64")]


def test_an_artifact_is_run_on_the_model_s_own_inputs() -> None:
    model, x = Model().eval(), torch.randn(2, 5, 8)
    mask = torch.randint(0, 2, (2, 5))
    inputs = {"x": x, "mask": mask}
    assert verify_artifact(NumpyArtifact(model, 0.0, SPECS), model, inputs).ok
    assert verify_artifact(NumpyArtifact(model, 0.0, SPECS), model, (x, mask)).ok
    assert verify_artifact(NumpyArtifact(model, 0.0, SPECS[:1]), model, (x,)).ok
    assert not verify_artifact(NumpyArtifact(model, 1e-2, SPECS[:1]), model, (x,)).ok


def test_missing_inputs_and_other_outputs_are_clear_errors() -> None:
    model, x = Model().eval(), torch.randn(2, 5, 8)
    with pytest.raises(VerifyError, match="mask"):
        verify_artifact(NumpyArtifact(model, 0.0, SPECS), model, {"x": x})
    with pytest.raises(VerifyError, match="1 inputs given"):
        verify_artifact(NumpyArtifact(model, 0.0, SPECS), model, (x,))
    with pytest.raises(VerifyError, match="2 outputs, the model 1"):
        verify_artifact(NumpyArtifact(model, 0.0, SPECS[:1]), model.layer, (x,))


def test_flat_tensors_keeps_the_order_of_nested_outputs() -> None:
    a, b, c = (torch.full((1,), float(i)) for i in range(3))
    assert [int(t) for t in flat_tensors({"z": a, "y": (b, None, [c])})] == [0, 1, 2]


def test_compare_models_measures_and_does_not_judge() -> None:
    a, b = nn.Linear(8, 4), nn.Linear(8, 4)
    batches = [{"input": torch.randn(6, 8)} for _ in range(2)]
    same = compare_models(a, a, batches)
    assert same.cosine_mean == pytest.approx(1)
    assert same.relative_error == 0
    other = compare_models(a, b, batches)
    want = torch.cosine_similarity(
        torch.cat([a(x["input"]) for x in batches]), torch.cat([b(x["input"]) for x in batches])
    )
    assert other.cosine_mean == pytest.approx(float(want.detach().mean()), abs=1e-5)
    assert other.cosine_mean < 0.99


def test_a_half_precision_model_is_held_to_its_own_step(tmp_path: Path) -> None:
    from rewriter.api import compile

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(40, 120)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).reshape(2, 33, 3, 5, 8).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return y.transpose(1, 2).contiguous().view(2, 33, 40)

    model = Attend().half().eval()
    artifact = compile(model, (torch.randn(2, 33, 40).half(),), path=tmp_path / "h.rwa", form="elu")
    verified = artifact.report["compiled"]
    assert verified["dtype"] == "float16"
    assert verified["ok"]
    assert 1e-6 < artifact.report["compiled_max_abs_error"] < 3e-2
