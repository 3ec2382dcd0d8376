"""Norms, softmax, reductions, activations: accuracy, odd widths, NaN."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.targets.lowering import check, lowered, run


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


WIDTHS = [1, 5, 21, 32, 40, 100]


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_any_width(width):
    def everything(x):
        return {
            "norm": F.layer_norm(x, (width,)),
            "softmax": torch.softmax(x, -1),
            "log": torch.log_softmax(x, -1),
            "mean": x.mean(-1),
            "sum": x.sum(-1, keepdim=True),
            "max": x.amax(-1),
        }

    result = check(Apply(everything), torch.randn(3, 4, width) * 3, tolerance=2e-5)
    assert [o.name for o in result.outputs] == ["norm", "softmax", "log", "mean", "sum", "max"]
    assert {k.scheduled_by for k in result.kernels} <= {
        "layer_norm", "softmax", "reduction", "tiny", "elementwise"
    }  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_and_rms_norm(bias):
    model = nn.Sequential(nn.LayerNorm(48, bias=bias), nn.RMSNorm(48, eps=1e-6))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    check(model, torch.randn(2, 9, 48), tolerance=1e-5)


@pytest.mark.parametrize("rows", [(1,), (2, 5), (49, 3), (3, 197)])
@pytest.mark.parametrize("width", [3, 32, 160, 1031])
def test_norms_of_tiles_that_rows_do_not_fill(rows, width):
    model = nn.Sequential(nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-6))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    result = check(model, torch.randn(*rows, width) * 3 + 10, tolerance=5e-5)
    assert {k.scheduled_by for k in result.kernels} == {"layer_norm"}


@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm])
def test_a_row_of_a_norm_sees_no_other_row(norm):
    x = torch.randn(300, 40)
    x[[7, 299], 3] = float("nan")
    x[150, 39] = float("inf")
    (got,) = run(lowered(Apply(lambda a: norm(a, (40,))), (x,)), (x,))
    odd = [7, 150, 299]
    assert np.isnan(got[[7, 299]]).all()
    assert np.isnan(got[150, 39])
    kept = np.delete(np.arange(300), odd)
    np.testing.assert_allclose(got[kept], norm(x.double(), (40,))[kept], atol=1e-5)


def test_scale_and_shift_of_a_norm_may_be_one_tensor():
    model = nn.LayerNorm(24)
    model.bias = model.weight = nn.Parameter(torch.randn(24))
    check(model, torch.randn(2, 30, 24), tolerance=1e-5)


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 2), (1, 2)])
def test_other_axes(dims):
    check(Apply(lambda x: (x.sum(dims), x.mean(dims), x.amax(dims))), torch.randn(33, 20, 24))


def test_argmax_finds_the_index():
    x = torch.randn(70, 90)
    (got,) = run(lowered(Apply(lambda a: a.argmax(-1)), (x,)), (x,))
    np.testing.assert_array_equal(got, x.argmax(-1).numpy())


FUNCTIONS = {
    "exp": torch.exp,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "exp2": torch.exp2,
}


def test_activations_are_accurate_and_keep_nan():
    x = torch.cat([torch.linspace(-10, 10, 5001), torch.tensor([float("nan")])])
    fn = Apply(lambda a: {name: f(a) for name, f in FUNCTIONS.items()})
    result = lowered(fn, (x,))
    for spec, got in zip(result.outputs, run(result, (x,)), strict=True):
        wanted = FUNCTIONS[spec.name](x.double()).numpy()
        assert np.isnan(got[-1]), spec.name
        np.testing.assert_allclose(got[:-1], wanted[:-1], rtol=2e-6, atol=1e-6, err_msg=spec.name)


def test_nan_and_minus_infinity_in_softmax():
    x = torch.randn(4, 50)
    x[1, 7] = float("nan")
    x[2, :20] = -float("inf")
    (got,) = run(lowered(Apply(lambda a: torch.softmax(a, -1)), (x,)), (x,))
    assert np.isnan(got[1]).all()
    np.testing.assert_allclose(got[[0, 2, 3]], torch.softmax(x, -1)[[0, 2, 3]], atol=1e-6)


def test_maximum_keeps_nan():
    x = torch.randn(3, 100)
    x[0, 5] = float("nan")
    (got,) = run(lowered(Apply(lambda a: a.amax(-1)), (x,)), (x,))
    assert np.isnan(got[0])
    np.testing.assert_array_equal(got[1:], x.amax(-1)[1:].numpy())
