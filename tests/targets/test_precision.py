"""Products in int8 and bfloat16 against float64 arithmetic on the same rounded values."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from codegen.frontend import to_relax
from codegen.host import cpu_features
from codegen.kernels import quantized
from codegen.lower import lower
from codegen.precision import require, why_not
from codegen.target import Target, target_named
from codegen.targets import cpu
from passes.errors import UnknownName, UsageError
from rewriter.api import compile as compile_artifact
from rewriter.verify import compare_arrays
from tests.targets.lowering import run

FEATURES = cpu_features()
VNNI = pytest.mark.skipif("avx512_vnni" not in FEATURES, reason="no avx512_vnni here")
BF16 = pytest.mark.skipif("avx512_bf16" not in FEATURES, reason="no avx512_bf16 here")


def narrow() -> Target:
    """The 256-bit target of processors with VNNI but without AVX-512."""
    return cpu._x86(frozenset((*cpu._V3, "avx_vnni")))


def kernel(tensors, arrays, attrs=None, target=None) -> list[np.ndarray]:
    """Schedule and run a TE definition; outputs (those without an array) start as NaN or 99."""
    import tvm
    from tvm import te

    from codegen import tvm_env
    from codegen.schedule import schedule

    target = target or target_named("cpu")
    func = te.create_prim_func(tensors)
    for name, value in (attrs or {}).items():
        func = func.with_attr(name, value)
    outcome = schedule(func, target)
    assert outcome.rule
    assert not outcome.crashes
    done = outcome.func.with_attr("global_symbol", "main").with_attr("tirx.noalias", True)
    library = tvm.compile(tvm.IRModule({"main": done}), target=tvm_env.tvm_target(target))
    made = [
        np.full([int(d) for d in t.shape], np.nan if "float" in str(t.dtype) else 99, str(t.dtype))
        for t in tensors[len(arrays) :]
    ]
    given = [tvm.runtime.tensor(a) for a in (*arrays, *made)]
    library["main"](*given)
    return [t.numpy() for t in given[len(arrays) :]]


def placeholder(array, name):
    from tvm import te

    return te.placeholder(array.shape, str(array.dtype), name=name)


def quantize(x, target=None):
    rows = placeholder(x, "x")
    tensors = [rows, *quantized.quantize_rows(rows)]
    return kernel(tensors, [x], quantized.quantize_attributes(), target)


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 37), (1, 3), (40, 100)])
@pytest.mark.parametrize("shift", [0.0, 3.0, -9.0])
def test_rows_are_quantised_by_their_own_range(shape, shift):
    x = (np.random.default_rng().standard_normal(shape) + shift).astype(np.float32)
    q, scale, zero = quantize(x)
    assert q.shape[-1] % 4 == 0
    assert (q[..., shape[-1] :] == 0).all()
    span = np.maximum(x.max(-1), 0).astype(np.float64) - np.minimum(x.min(-1), 0)
    np.testing.assert_allclose(scale, span / 255, rtol=1e-5)
    codes = q[..., : shape[-1]].astype(np.float64) - zero[..., None]
    # Half a step for the value and half a step for the place of zero.
    assert (np.abs(codes * scale[..., None] - x) <= 1.001 * scale[..., None]).all()
    if x.size > 100:
        assert np.abs(codes * scale[..., None] - x).mean() < 0.3 * scale.mean()


def test_rows_of_zeros_and_rows_that_are_not_finite():
    x = np.random.default_rng().standard_normal((5, 33)).astype(np.float32)
    x[1], x[2, 7], x[3, 32], x[4, 0] = 0, np.nan, np.inf, -np.inf
    q, scale, zero = quantize(x)
    assert (np.isfinite(scale) == [True, True, False, False, False]).all()
    assert scale[1] == 0
    assert (q[1, :33] == zero[1]).all()


def test_bits_of_bfloat16_are_torch_s():
    x = np.random.default_rng().standard_normal(4096).astype(np.float32)
    x[:6] = np.nan, np.inf, -np.inf, 0.0, 3.4e38, 1e-40
    x[6:9] = np.array([0x3F808000, 0x3F818000, 0x7F800001], np.uint32).view(np.float32)
    want = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    rows = placeholder(x.reshape(64, 64), "x")
    (made,) = kernel([rows, quantized.to_bf16(rows)], [x.reshape(64, 64)])
    for got in (quantized.bf16_bits(x), made.reshape(-1)):
        numbers = ~np.isnan(x)
        assert (got[numbers] == want[numbers]).all()
        assert ((got[~numbers] & 0x7FFF) > 0x7F80).all()


SHAPES = [(37, 33, 65), (1, 50, 7), (64, 64, 96), (9, 3, 130)]


@VNNI
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("wide", [True, False])
def test_int8_sums_are_exact(size, wide):
    if not wide and "avx_vnni" not in FEATURES:
        pytest.skip("no avx_vnni here")
    target = target_named("cpu") if wide else narrow()
    rng, (m, k, n) = np.random.default_rng(), size
    x = (rng.standard_normal((m, k)) + 1).astype(np.float32)
    codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
    codes[0], x[0] = 127, np.abs(x[0])
    scale = rng.random(n).astype(np.float32)
    q, s, z = quantize(x, target)
    packed = quantized.pack_groups(codes, 2 * target.lanes, "int8")
    arrays = [q, s, z, packed, scale, codes.sum(1, dtype=np.int32)]
    tensors = [placeholder(a, f"a{i}") for i, a in enumerate(arrays)]
    out = quantized.dense_int8(*tensors, n, target)
    (got,) = kernel([*tensors, out], arrays, target=target)
    sums = (q[:, :k].astype(np.int64) - z[:, None]) @ codes.T.astype(np.int64)
    want = sums * (s.astype(np.float64)[:, None] * scale)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@BF16
@pytest.mark.parametrize("size", SHAPES)
def test_bf16_sums_in_float32(size):
    target = target_named("cpu")
    rng, (m, k, n) = np.random.default_rng(), size
    x, w = (quantized.bf16_bits(rng.standard_normal(s)) for s in ((m, k), (n, k)))
    padded = np.zeros((m, quantized.padded(k, "bf16")), np.uint16)
    padded[:, :k] = x
    arrays = [padded, quantized.pack_groups(w, 2 * target.lanes, "bf16")]
    tensors = [placeholder(a, f"a{i}") for i, a in enumerate(arrays)]
    (got,) = kernel([*tensors, quantized.dense_bf16(*tensors, n, target)], arrays)
    a, b = ((v.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for v in (x, w))
    np.testing.assert_allclose(got, a @ b.T, atol=2e-5, rtol=1e-5)


class Block(nn.Module):
    """Two products of the same rows, one after a GELU, and a residual."""

    def __init__(self, width=40, inner=70):
        super().__init__()
        self.one, self.gate = nn.Linear(width, inner), nn.Linear(width, inner, bias=False)
        self.two = nn.Linear(inner, width)

    def forward(self, x):
        return x + self.two(F.gelu(self.one(x)) * self.gate(x))


def emulated(x, layer, precision):
    """A linear layer in float64 on values rounded as the precision rounds them."""
    x, w = x.double(), layer.weight.detach().double()
    if precision == "int8":
        low, high = x.amin(-1, True).clamp(max=0), x.amax(-1, True).clamp(min=0)
        step = (high - low) / 255
        x = ((x / step).round() + (-low / step).round()).clamp(0, 255) - (-low / step).round()
        x, scale = x * step, w.abs().amax(1, True) / 127
        w = (w / scale).round() * scale
    else:
        x, w = x.to(torch.bfloat16).double(), w.to(torch.bfloat16).double()
    return x @ w.T + (0 if layer.bias is None else layer.bias.detach().double())


@pytest.mark.parametrize(
    ("precision", "options", "tolerance"),
    [
        pytest.param("int8", {}, 2e-2, marks=VNNI),
        pytest.param("bf16", {}, 1e-2, marks=BF16),
        pytest.param("bf16", {"bf16": "widen"}, 1e-2, marks=BF16),
    ],
)
def test_a_block_is_what_its_rounding_says(precision, options, tolerance):
    target = dataclasses.replace(target_named("cpu"), options=options)
    model, x = Block().eval(), torch.randn(2, 19, 40)
    exported = torch.export.export(model, (x,))
    result = lower(to_relax(exported, target), target, precision=precision)
    names = {k.name: k for k in result.kernels}
    assert any("gelu" in n and "dense" in n for n in names)
    converted = [k for n, k in names.items() if n.startswith(("quantize", "to_bf16", "round"))]
    # The rows of x are converted once for both products that read them.
    assert sum(k.count for k in converted) <= 2
    (got,) = run(result, (x,), target)
    inner = F.gelu(emulated(x, model.one, precision)) * emulated(x, model.gate, precision)
    want = x.double() + emulated(inner.float(), model.two, precision)
    np.testing.assert_allclose(got, want.numpy(), atol=tolerance)
    plain = model.double()(x.double()).detach().numpy()
    ours, cost = np.abs(got - want.numpy()).mean(), np.abs(plain - want.numpy()).mean()
    assert ours < cost / 3  # closer to the rounding it claims than to no rounding


@VNNI
def test_tied_weights_stay_float32():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mid = nn.Embedding(90, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 90, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.mid(self.table(ids)))

    target, model, ids = target_named("cpu"), Model().eval(), torch.randint(0, 90, (2, 9))
    exported = torch.export.export(model, (ids,))
    result = lower(to_relax(exported, target), target, precision="int8")
    assert {k.scheduled_by for k in result.kernels} >= {"dense", "dense_int8"}
    (got,) = run(result, (ids,), target)
    assert np.abs(got - model(ids).detach().numpy()).max() < 0.25


@VNNI
def test_an_artifact_says_its_precision_and_what_it_cost(tmp_path):
    model, x = Block(64, 128).eval(), torch.randn(1, 30, 64)
    made = {
        p: compile_artifact(model, (x,), path=tmp_path / f"{p}.rwa", precision=p, on_noop="ok")
        for p in ("fp32", "int8")
    }
    assert made["int8"].manifest.precision == "int8"
    assert made["fp32"].manifest.precision == "float32"
    costs = {p: a.report["artifact"]["precision"] for p, a in made.items()}
    assert costs["int8"]["name"] == "int8"
    assert costs["fp32"]["relative_error"] < 1e-5 < costs["int8"]["relative_error"] < 5e-2
    assert 0.99 < costs["int8"]["cosine_min"] < 1 - 1e-7
    assert made["int8"].report["compiled"]["dtype"] == "int8"
    assert made["int8"].report["artifact"]["weights_bytes"] < 30_000 < 64 * 128 * 3 * 4


def test_int8_tolerance_still_refuses_wrong_code():
    want = np.random.default_rng().standard_normal((20, 30)).astype(np.float32)
    for wrong in (-want, want * 1.3, np.roll(want, 1), np.zeros_like(want)):
        assert not compare_arrays({"y": wrong}, {"y": want}, dtype="int8").ok


def test_targets_without_the_instructions_refuse_with_the_reason():
    plain = dataclasses.replace(target_named("cpu"), features=("avx2",))
    for precision, target in itertools.product(("bf16", "int8"), (plain, None)):
        target = target or target_named("edge:cortex-a72")
        with pytest.raises(UsageError, match=r"needs dot products .* use fp32"):
            require(precision, target)
    assert why_not("fp32", plain) == ""
    assert why_not("int8", narrow()) == ""
    assert "avx512_bf16" in why_not("bf16", narrow())
    with pytest.raises(UnknownName, match="int4"):
        require("int4", plain)
