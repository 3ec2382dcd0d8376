"""Chains of row-wise operators: right results on any number of rows, and found only where told."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from codegen.frontend import to_relax
from codegen.graph_passes import row_chain
from codegen.kernels.row_chain import ChainFacts, Layer
from codegen.lower import lower
from codegen.target import target_named
from tests.targets.lowering import check, lowered, run

TARGET = target_named("cpu")


class _Block(nn.Module):
    """What follows an attention in a block with its norms in front, and the next projection."""

    def __init__(self, width: int = 64, hidden: int = 160, act: Any = F.gelu) -> None:
        super().__init__()
        self.out, self.act = nn.Linear(32, width), act
        self.norm, self.next = nn.LayerNorm(width), nn.LayerNorm(width)
        self.one, self.two = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.qkv = nn.Linear(width, 96)
        for norm in (self.norm, self.next):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, o: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.out(o)
        x = x + self.two(self.act(self.one(self.norm(x))))
        return x, self.qkv(self.next(x))


@pytest.fixture
def always(monkeypatch):
    """Take every chain, however small."""
    monkeypatch.setattr(row_chain, "LARGE", 1)
    monkeypatch.setattr(row_chain, "_TIMES", 0)


def _rules(result: Any) -> list[str]:
    return [k.scheduled_by for k in result.kernels]


@pytest.mark.parametrize(
    "shape", [(1, 197), (2, 37), (3, 1), (1, 1), (50,), (1, 9), (2, 3, 8), (1, 198)]
)
def test_any_number_of_rows(always, shape):
    result = check(_Block(), torch.randn(*shape, 32), torch.randn(*shape, 64))
    assert _rules(result) == ["row_chain"] * 3


@pytest.mark.parametrize("act", [F.gelu, F.silu, torch.relu, torch.tanh, lambda x: x])
def test_activations(always, act):
    result = check(_Block(act=act), torch.randn(1, 29, 32), torch.randn(1, 29, 64))
    assert _rules(result) == ["row_chain"] * 3


class _Scaled(nn.Module):
    """RMS norm, no biases, a learned factor a column, and something else added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(48, eps=1e-5)
        self.one, self.two = nn.Linear(48, 96, bias=False), nn.Linear(96, 64)
        self.scale = nn.Parameter(torch.randn(64))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.two(F.silu(self.one(self.norm(x)))) * self.scale


def test_factors_join_the_weight(always):
    result = check(_Scaled(), torch.randn(1, 23, 48), torch.randn(1, 23, 64))
    assert _rules(result) == ["row_chain"]


class _Read(nn.Module):
    """The normed and the hidden rows are read by others too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.one, self.two = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed = self.norm(x)
        hidden = torch.relu(self.one(normed))
        return normed, hidden, x + self.two(hidden)


def test_what_others_read_is_written(always):
    result = check(_Read(), torch.randn(1, 21, 32))
    assert sorted(_rules(result)) == ["layer_norm", "row_chain", "row_chain"]


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def test_shared_weights_and_odd_widths_stay_products(always):
    result = check(_Tied(), torch.randint(0, 64, (1, 40)))
    assert "row_chain" not in _rules(result)
    assert sum(w.nbytes for w in result.weights.values()) == 64 * 32 * 4
    odd = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 33))
    assert "row_chain" not in _rules(check(odd, torch.randn(1, 40, 24)))


def test_a_single_product_keeps_what_follows(always):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(32, 64)

        def forward(self, x):
            return torch.exp(self.one(x) / (x[..., :1] * x[..., :1] + 1.0))

    assert "dense" in _rules(check(Model(), torch.randn(1, 19, 32)))


def _mlp(hidden: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, hidden), nn.GELU(), nn.Linear(hidden, 32))


def test_hidden_rows_are_not_written():
    result = check(_mlp(512), torch.randn(1, 4101, 32))
    assert _rules(result) == ["row_chain"]
    assert result.memory.activations == 4101 * 32 * 4


@pytest.mark.parametrize(
    ("rows", "l2", "taken"), [(600, 150_000, True), (500, 150_000, False), (600, 99_999, False)]
)
def test_rows_and_weights_decide(rows, l2, taken):
    target, x = replace(TARGET, l2_bytes=l2), torch.randn(1, rows, 32)
    assert ("row_chain" in _rules(lowered(_mlp(512), (x,), target))) == taken
    single = nn.Sequential(nn.Linear(32, 512)).eval()
    assert "row_chain" not in _rules(lowered(single, (x,), target))


def test_only_float32():
    exported = torch.export.export(_mlp(512).eval(), (torch.randn(1, 5000, 32),))
    halves = lower(to_relax(exported, TARGET), TARGET, precision="bf16")
    assert "row_chain" not in _rules(halves)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_small_caches(always, threads):
    small = replace(TARGET, threads=threads, l2_bytes=8 * 1024)
    model, args = _Block().eval(), (torch.randn(1, 83, 32), torch.randn(1, 83, 64))
    got = run(lowered(model, args, small), args, small)
    with torch.no_grad():
        wanted = model.double()(*(a.double() for a in args))
    for have, want in zip(got, wanted, strict=True):
        np.testing.assert_allclose(have, want.numpy(), atol=1e-4, rtol=1e-4)


def test_edge(always):
    edge = target_named("edge:cortex-a72")
    result = lowered(_Block().eval(), (torch.randn(1, 83, 32), torch.randn(1, 83, 64)), edge)
    assert set(_rules(result)) == {"row_chain"}


def test_nan_in_a_row_stays_in_that_row(always):
    o, x = torch.randn(1, 30, 32), torch.randn(1, 30, 64)
    o[0, 11, 5] = float("nan")
    model = _Block(act=torch.relu).eval()
    for got in run(lowered(model, (o, x)), (o, x)):
        assert np.isnan(got[0, 11]).all()
        assert not np.isnan(np.delete(got, 11, axis=1)).any()


def test_facts_as_data():
    facts = ChainFacts(
        (Layer(bias=True, add="given"), Layer("layer_norm", 1e-6, act="relax.nn.gelu"))
    )
    assert ChainFacts.from_json(facts.to_json()) == facts
