"""What must not be matched, each with its reason; the graph around it keeps its meaning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.canonicalise import canonicalise
from passes.find import find
from tests.match.spellings import SCALE, Attention, B, D, H, T, back, heads
from tests.match.test_spellings import export, inputs

CASES: list[tuple[str, str, Callable[..., Tensor]]] = []


def case(name: str, reason: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def add(spelling: Callable[..., Tensor]) -> Callable[..., Tensor]:
        CASES.append((name, reason, spelling))
        return spelling

    return add


@case("softmax over the queries", "softmax over the wrong axis")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back((q @ k.mT * SCALE).softmax(-2) @ v)


@case("softmax over the heads", "not an axis of tokens")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back((q @ k.mT * SCALE).softmax(1) @ v)


@case("key reshaped", "reshaped across its axes")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back((q @ k.reshape(B, H, D, T) * SCALE).softmax(-1) @ v)


@case("key not transposed", "not transposed")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    k = F.pad(k, (0, 0, 0, D - T))  # as many tokens as features
    return back((q @ k * SCALE).softmax(-1) @ F.pad(v, (0, 0, 0, D - T)))


@case("key permuted among the heads", "reshaped across its axes")
def _(q, k, v, mask):
    q, v = heads(q, v)
    return back((q @ k.reshape(B, H, D, T) * SCALE).softmax(-1) @ v)


@case("attention of channels", "not transposed")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back(((q.mT @ k * SCALE).softmax(-1) @ v.mT).mT)


@case("logits used elsewhere", "used elsewhere")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    scores = q @ k.mT * SCALE
    return back(scores.softmax(-1) @ v + scores.sum(-1, keepdim=True))


@case("probabilities used elsewhere", "the probabilities are used elsewhere")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    probs = (q @ k.mT * SCALE).softmax(-1)
    return back(probs @ v + probs.mean(-1, keepdim=True))


@case("probabilities used twice", "the probabilities are used elsewhere")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    probs = (q @ k.mT * SCALE).softmax(-1)
    return back(probs @ v + probs @ k)


@case("probabilities changed", "the probabilities go to")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    probs = (q @ k.mT * SCALE).softmax(-1) * mask[:, None, None, :].float()
    return back(probs @ v)


@case("softmax of features", "a view mixes the token axes")
def _(q, k, v, mask):
    return back((q.transpose(1, 2) @ v.transpose(1, 2).mT) @ v.transpose(1, 2)).softmax(-1)


@case("gate", "not a product q k^T")
def _(q, k, v, mask):
    return q.softmax(-1) * v


@case("a fill that hides nothing", "does not hide a key")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    scores = (q @ k.mT * SCALE).masked_fill(mask[:, None, None, :] == 0, -2.0)
    return back(scores.softmax(-1) @ v)


@case("logits squashed", "the logits go through 'tanh'")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back((torch.tanh(q @ k.mT) * SCALE).softmax(-1) @ v)


@case("logits scaled by a tensor", "not a constant number")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back((q @ k.mT * v.mean(-1, keepdim=True)).softmax(-1) @ v)


@case("product over the queries", "softmax over the wrong axis")
def _(q, k, v, mask):
    q, k, v = heads(q, k, v)
    return back((q @ k.mT * SCALE).softmax(-1).mT @ v)


@pytest.mark.parametrize(("name", "reason", "spelling"), CASES, ids=[c[0] for c in CASES])
def test_near_miss(name: str, reason: str, spelling: Callable[..., Tensor]) -> None:
    args = inputs()
    model = Attention(spelling).eval()
    traced = export(model, args)
    canonical = canonicalise(traced)
    found = find(canonical)
    assert not found.sites
    assert found.near_misses
    assert reason in found.near_misses[0].reason
    assert found.near_misses[0].source.startswith("spellings.py:")
    assert found.near_misses[0].node in {n.name for n in canonical.module.graph.nodes}
    x = torch.randn(B, T, H * D)
    torch.testing.assert_close(canonical.module(x, args[1]), model(x, args[1]))


def test_a_tampered_match_fails_its_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof is what decides: a rebuild with another scale is refused."""
    import passes.rebuild as rebuild

    honest = rebuild.call_sdpa

    def wrong(builder, qkv, mask, dropout, causal, scale):
        return honest(builder, qkv, mask, dropout, causal, scale * 1.1)

    monkeypatch.setattr(rebuild, "call_sdpa", wrong)

    def plain(q, k, v, mask):
        q, k, v = heads(q, k, v)
        return back((q @ k.mT * SCALE).softmax(-1) @ v)

    args = inputs()
    model = Attention(plain).eval()
    canonical = canonicalise(export(model, args))
    found = find(canonical)
    assert not found.sites
    assert "proof failed: max error" in found.near_misses[0].reason
    torch.testing.assert_close(canonical.module(*args), model(*args))
    nodes = canonical.module.graph.nodes
    assert not [n for n in nodes if "scaled_dot_product" in n.name]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).softmax(-1)


def test_a_classifier_is_a_near_miss_only() -> None:
    found = find(export(Classifier(), (torch.randn(2, 4),)))
    assert not found.sites
    assert "not a product q k^T" in found.near_misses[0].reason


class Memory(nn.Module):
    """Keys and values are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.keys.t()).softmax(-1) @ self.keys


def test_trained_keys_are_a_near_miss() -> None:
    found = find(export(Memory(), (torch.randn(2, 3, 4),)))
    assert not found.sites
    assert "trained parameter" in found.near_misses[0].reason
