"""A GELU that only rounded products read is computed as far as their rounding lets it matter."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from codegen.frontend import to_relax
from codegen.kernels import activations
from codegen.lower import lower
from codegen.precision import why_not
from codegen.target import target_named
from tests.targets.lowering import run
from tests.targets.test_precision import kernel, placeholder

CPU = target_named("cpu")


def needs(precision):
    return pytest.mark.skipif(bool(why_not(precision, CPU)), reason=f"no {precision} here")


PRECISIONS = [pytest.param(p, marks=needs(p)) for p in ("bf16", "int8")]


def test_is_within_its_bound_of_float64():
    rng = np.random.default_rng()
    x = np.concatenate([rng.uniform(-6, 6, 60_000), rng.normal(size=4000) * 1e3])
    x = x.astype(np.float32).reshape(125, -1)
    rows = placeholder(x, "x")
    out = activations.elementwise(activations.gelu_coarse, "gelu_coarse")(rows)
    (got,) = kernel([rows, out], [x])
    want = F.gelu(torch.from_numpy(x).double()).numpy()
    assert (np.abs(got - want) < 2e-4 + 1e-6 * np.abs(x)).all()
    x[3, 5] = np.nan
    (got,) = kernel([rows, out], [x])
    assert np.isnan(got[3, 5])
    assert np.isnan(got).sum() == 1


class Layers(nn.Module):
    """Two linear layers around a GELU, which is an output too if `seen`."""

    def __init__(self, seen):
        super().__init__()
        self.one, self.two, self.seen = nn.Linear(48, 96), nn.Linear(96, 40), seen

    def forward(self, x):
        inner = F.gelu(self.one(x))
        return (self.two(inner), inner) if self.seen else self.two(inner)


def lowered(seen, precision):
    model, x = Layers(seen).eval(), torch.randn(2, 21, 48)
    exported = torch.export.export(model, (x,))
    return lower(to_relax(exported, CPU), CPU, precision=precision), model, x


@pytest.mark.parametrize("precision", PRECISIONS)
def test_is_fused_behind_the_product_that_makes_it(precision):
    result, model, x = lowered(False, precision)
    assert [k.name for k in result.kernels if "gelu" in k.name] == [
        k.name for k in result.kernels if "gelu_coarse" in k.name and "dense" in k.name
    ]
    assert any("gelu_coarse" in k.name for k in result.kernels)
    (got,) = run(result, (x,))
    want = model.double()(x.double()).detach().numpy()
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()


@pytest.mark.parametrize(
    ("seen", "precision"), [(False, "fp32"), *[(True, *p.values) for p in PRECISIONS[:1]]]
)
def test_stays_exact_where_anything_else_reads_it(seen, precision):
    if why_not(precision, CPU):
        pytest.skip(f"no {precision} here")
    result, *_ = lowered(seen, precision)
    assert not any("gelu_coarse" in k.name for k in result.kernels)
    assert any("gelu" in k.name for k in result.kernels)
