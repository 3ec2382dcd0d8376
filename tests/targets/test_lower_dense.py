"""Linear layers and matrix products of every awkward size."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from codegen.kernels.dense import pack, panel_width, row_tile
from codegen.target import target_named
from tests.targets.lowering import check


def _by(result) -> dict[str, str]:
    return {k.name: k.scheduled_by for k in result.kernels}


@pytest.mark.parametrize(
    ("shape", "width", "out"),
    [
        ((1, 64), 48, 96),
        ((1, 1), 64, 200),
        ((2, 37), 33, 65),
        ((3, 1), 20, 7),
        ((5,), 16, 1),
        ((2, 3, 11), 24, 50),
    ],
)
def test_linear_with_epilogue(shape, width, out):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(width, out), nn.Linear(out, width)

        def forward(self, x):
            return x + self.two(F.gelu(self.one(x)))

    result = check(Model(), torch.randn(*shape, width))
    products = {n: r for n, r in _by(result).items() if "dense" in n}
    assert set(products.values()) == {"dense"}
    # Batches of one row become rows, and a reshape stands between product and epilogue.
    assert shape == (3, 1) or any("gelu" in name for name in products)


@pytest.mark.parametrize("sizes", [(1, 3, 5, 7, 9), (2, 4, 19, 32, 64), (1, 1, 40, 16, 33)])
def test_batched_product(sizes):
    b, h, t, k, n = sizes

    class Model(nn.Module):
        def forward(self, x, y):
            return torch.tanh(x @ y)

    result = check(Model(), torch.randn(b, h, t, k), torch.randn(b, h, k, n))
    assert "batch_matmul" in _by(result).values()


def test_product_broadcasts_leading_axes():
    class Model(nn.Module):
        def forward(self, x, y):
            return x @ y

    check(Model(), torch.randn(3, 1, 6, 8), torch.randn(2, 8, 5))


def test_tied_weight_is_stored_once():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(90, 32)
            self.head = nn.Linear(32, 90, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(F.silu(self.table(ids)))

    result = check(Model(), torch.randint(0, 90, (2, 9)))
    assert sum(w.nbytes for w in result.weights.values()) == 90 * 32 * 4
    assert (result.inputs[0].low, result.inputs[0].high) == (0, 89)


def test_equal_weights_are_stored_once():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
            self.two.weight = nn.Parameter(self.one.weight.detach().clone())

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    result = check(Model(), torch.randn(4, 32))
    assert sum(w.nbytes for w in result.weights.values()) == 32 * 32 * 4


def test_panels_hold_the_weight():
    weight = np.random.default_rng().standard_normal((37, 5)).astype("float32")
    panels = pack(weight, 16)
    assert panels.shape == (3, 5, 16)
    flat = panels.transpose(0, 2, 1).reshape(48, 5)
    np.testing.assert_array_equal(flat[:37], weight)
    assert not flat[37:].any()


@pytest.mark.parametrize("rows", [1, 7, 49, 64, 197, 509])
def test_row_tile_wastes_little(rows):
    for name in ("cpu", "edge:cortex-a72"):
        tile = row_tile(rows, target_named(name))
        padded = -(-rows // tile) * tile
        assert padded - rows < tile
        assert padded <= rows * 1.1 + 4
        assert panel_width(target_named(name)) % target_named(name).lanes == 0


def test_nan_in_an_input_row_stays_in_that_row():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(24, 40)

        def forward(self, x):
            return F.gelu(self.one(x))

    from tests.targets.lowering import lowered, run

    x = torch.randn(5, 24)
    x[2, 3] = float("nan")
    model = Model()
    (got,) = run(lowered(model, (x,)), (x,))
    assert np.isnan(got[2]).all()
    assert not np.isnan(got[[0, 1, 3, 4]]).any()
