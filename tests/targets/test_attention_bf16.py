"""Softmax attention on pairs of bfloat16: against float64, and where it is used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from codegen.frontend import to_relax
from codegen.host import cpu_features
from codegen.lower import lower
from codegen.schedules._pairs import has_pairs
from codegen.target import target_named
from codegen.targets import cpu
from rewriter.api import compile as compile_artifact
from tests.targets.kit_tools import Case, Trial, trial
from tests.targets.lowering import run
from tests.targets.test_kit_attention import CASES

CPU = target_named("cpu")
PAIRS = pytest.mark.skipif(not has_pairs(CPU), reason="no fast products of bfloat16 pairs here")
VNNI = pytest.mark.skipif("avx512_vnni" not in cpu_features(), reason="no avx512_vnni here")
# Odd numbers of keys and channels, and ends of panels of 32.
MORE = [
    Case(T=9, S=33, D=33, E=17, H=3, G=1),
    Case(B=2, T=31, S=63, D=7, E=50, key_rows=2),
    Case(T=8, S=1, D=64, E=96),
    Case(T=65, S=1537, D=48, E=33, H=1, G=1),
    Case(T=600, S=1100, D=16, E=16, H=1, G=1, causal=True, key_rows=1),
    Case(B=2, T=40, S=601, D=16, E=16, bias=(2, 1, 1, 601), key_rows=2),
]


def rounded(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).to(torch.bfloat16).to(torch.float32).numpy()


def built(t: Trial):
    made = t.build("bf16")
    assert [k.scheduled_by for k in made.kernels] == ["attention_bf16"]
    return made


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@PAIRS
@pytest.mark.parametrize("case", CASES + MORE, ids=str)
def test_equals_float64_as_far_as_rounding_goes(case: Case) -> None:
    t = trial("exact", case, np.random.default_rng())
    y, want = t.run(built(t)), t.reference()
    # Scores are off by about 2^-9 sqrt(D) |q| |k| / D, weights by 2^-9 more: 1e-2 of a value of 1.
    assert rms(y - want) < 8e-3 * max(rms(want), 0.1)
    np.testing.assert_allclose(y, want, atol=4e-2, rtol=0)


@PAIRS
@pytest.mark.parametrize("case", [Case(T=70, S=300), Case(T=70, S=70, causal=True, E=64)], ids=str)
def test_is_what_its_rounding_says(case: Case) -> None:
    """Nearer to float64 attention of rounded q, k and v than rounding moved that."""
    t = trial("exact", case, np.random.default_rng())
    y, plain = t.run(built(t)), t.reference()
    scale = case.D**-0.5 / np.log(2.0)
    arrays = {n: rounded(t.arrays[n]) for n in "kv"}
    arrays["q"] = rounded((t.arrays["q"] * np.float32(scale)).astype(np.float32))
    held = replace(t, arrays=arrays)
    inner = replace(t.spec, scale=float(np.log(2.0)))
    q, k, v = (torch.from_numpy(held.arrays[n]).double() for n in "qkv")
    want = t.form.attend(inner, {}, q, k, v, None, None).numpy()
    assert rms(y - want) < 2.5e-3 * rms(want)
    assert rms(y - want) < 0.7 * rms(plain - want)


@PAIRS
@pytest.mark.parametrize("how", [{}, {"causal": True}, {"bias": (1, 1, 40, 700)}], ids=str)
def test_weights_sum_to_one_as_they_are_used(how) -> None:
    t = trial("exact", Case(T=40, S=700, **how), np.random.default_rng())
    t.arrays["v"][:] = -1.3125
    np.testing.assert_allclose(t.run(built(t)), -1.3125, rtol=2e-6)


@PAIRS
def test_rows_that_see_no_key_are_zero() -> None:
    rng = np.random.default_rng()
    t = trial("exact", Case(B=2, key_rows=2), rng)
    t.arrays["key_mask"][1] = False
    y = t.run(built(t))
    assert np.all(y[1] == 0)
    assert np.all(np.abs(y[0]).sum(-1) > 0)
    t = trial("exact", Case(bias=(1, 1, 33, 33)), rng)
    t.arrays["bias"][0, 0, 4] = -np.inf
    y = t.run(built(t))
    assert np.all(y[0, :, 4] == 0)
    assert np.all(np.abs(y[0, :, 5]).sum(-1) > 0)


@PAIRS
def test_a_row_at_the_lowest_float_averages_as_torch_does() -> None:
    t = trial("exact", Case(T=6, S=20, bias=(1, 1, 6, 20)), np.random.default_rng())
    t.arrays["bias"][0, 0, 2] = np.finfo("float32").min
    mean = rounded(t.arrays["v"]).mean(2)
    np.testing.assert_allclose(t.run(built(t))[:, :, 2], mean, atol=1e-5)


@PAIRS
@pytest.mark.parametrize(("name", "at"), [("q", (0, 1, 7, 3)), ("k", (0, 1, 39, 0))])
def test_nan_reaches_the_rows_it_concerns_and_no_others(name, at) -> None:
    t = trial("exact", Case(T=20, S=40), np.random.default_rng())
    t.arrays[name][at] = np.nan
    bad = np.isnan(t.run(built(t)))
    assert bad[0, 1, 7].all()
    assert not bad[0, 0].any()
    assert bad[0, 1].all() == (name == "k")
    t = trial("exact", Case(T=20, S=40), np.random.default_rng())
    t.arrays["v"][0, 0, 0, 5] = np.nan
    bad = np.isnan(t.run(built(t)))
    assert bad[0, 0, :, 5].all()
    assert bad.sum() == 20


@PAIRS
def test_future_keys_do_not_leak() -> None:
    t = trial("exact", Case(T=40, S=40, causal=True), np.random.default_rng())
    made = built(t)
    before = t.run(made)
    t.arrays["k"][:, :, 21:], t.arrays["v"][:, :, 21:] = 1e3, -1e3
    after = t.run(made)
    # Longer keys may send a task to the true maxima, where weights are rounded at other places.
    np.testing.assert_allclose(before[:, :, :21], after[:, :, :21], atol=3e-2, rtol=0)
    assert np.abs(before[:, :, 21:] - after[:, :, 21:]).max() > 1


@PAIRS
@pytest.mark.parametrize("masked", [False, True])
def test_rows_far_below_their_bound_are_done_again(masked: bool) -> None:
    """|q| |k| is far from every logit: queries are nearly orthogonal to long keys."""
    t = trial("exact", Case(B=2, T=40, S=90, key_rows=2 if masked else 0), np.random.default_rng())
    t.arrays["q"][:, :, 20:, 0] = 4e3
    t.arrays["k"][..., 0] = 0.0
    t.arrays["k"][:, :, 3, 0] = -1e3
    y, want = t.run(built(t)), t.reference()
    assert np.isfinite(y).all()
    assert rms(y - want) < 8e-3 * rms(want)


@PAIRS
def test_large_logits_do_not_overflow() -> None:
    t = trial("exact", Case(T=10, S=30), np.random.default_rng())
    for name in "qk":
        t.arrays[name] = rounded(t.arrays[name])
    t.arrays["q"] *= 256
    y = t.run(built(t))
    assert np.isfinite(y).all()
    # The scale is a part of q before it is rounded: logits of up to 300 are off by 1 at most.
    sharp = np.sort(t.arrays["q"] @ t.arrays["k"].swapaxes(2, 3), -1)
    sure = (sharp[..., -1] - sharp[..., -2]) * 32**-0.5 > 12
    assert sure.sum() > 3
    np.testing.assert_allclose(y[sure], t.reference()[sure], atol=2e-2)


class Model(nn.Module):
    """A linear layer before and after two heads of attention, padded keys hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x, mask):
        q, k, v = (y.unflatten(-1, (2, 32)).transpose(1, 2) for y in self.first(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.last(y.transpose(1, 2).flatten(2))


def example() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 50, 64), torch.rand(2, 50) > 0.3


TARGETS = {
    "here": CPU,
    "no avx512_bf16": replace(
        CPU, features=tuple(f for f in CPU.features if f != "avx512_bf16"), options={}
    ),
    "widened": replace(CPU, options={"bf16": "widen"}),
    "256 bit": cpu._x86(frozenset((*cpu._V3, "avx_vnni"))),
    "board": target_named("edge:cortex-a72"),
    "GPU": target_named("cuda:sm_90"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_only_processors_with_fast_pairs_have_it(name) -> None:
    assert has_pairs(TARGETS[name]) == (name == "here" and has_pairs(CPU))


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        ("fp32", "here"),
        pytest.param("bf16", "widened", marks=PAIRS),
        pytest.param("int8", "no avx512_bf16", marks=VNNI),
    ],
)
def test_float32_attention_stays_where_it_was(precision, name) -> None:
    """Kernel for kernel what it would be without the rule."""
    from codegen.kit_build import build_form

    t = replace(trial("exact", Case(T=40, S=50), np.random.default_rng()), target=TARGETS[name])
    given = (t.form, t.spec, t.params, t.arrays, t.target)
    plain, made = build_form(*given), build_form(*given, precision)
    assert [k.scheduled_by for k in made.kernels] == ["attention"]
    for kernel, func in plain.scheduled.items():
        assert func.script() == made.scheduled[kernel].script()


@PAIRS
def test_float16_data_stays_with_the_float32_kernel() -> None:
    t = trial("exact", Case(T=20, S=40, dtype="float16"), np.random.default_rng())
    made = t.build("bf16")
    assert [k.scheduled_by for k in made.kernels] == ["attention"]
    np.testing.assert_allclose(t.run(made).astype("float64"), t.reference(), atol=2e-3)


@PAIRS
@pytest.mark.parametrize("precision", ["bf16", pytest.param("int8", marks=VNNI)])
def test_a_report_says_that_attention_is_in_bfloat16(precision, tmp_path) -> None:
    model, given = Model().eval(), example()
    artifact = compile_artifact(model, given, path=tmp_path / "a.rwa", precision=precision)
    rules = {k["scheduled_by"] for k in artifact.report["kernels"]}
    assert {"attention_bf16", f"dense_{precision}"} <= rules
    assert artifact.report["artifact"]["precision"]["attention_in_bf16"]
    assert any("softmax attention in bf16" in note for note in artifact.report["notes"])
    plain = compile_artifact(model, given, path=tmp_path / "b.rwa")
    assert not plain.report["artifact"]["precision"]["attention_in_bf16"]
    assert not any("bf16" in note for note in plain.report["notes"])


@PAIRS
def test_a_model_reads_and_writes_without_transposes() -> None:
    model, given = Model().eval(), example()
    exported = torch.export.export(model, given)
    result = lower(to_relax(exported, CPU), CPU, precision="bf16")
    (got,) = run(result, given)
    want = model.double()(given[0].double(), given[1]).detach().numpy()
    assert rms(got - want) < 1e-2 * rms(want)
