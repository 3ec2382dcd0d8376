"""Learning the hash of `hamming`: better codes on tokens it has not seen, the fit, a refresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from passes.errors import FitError, UsageError
from passes.forms import _hash
from passes.forms._hash_learn import Learning, agreement, labels, learn, pick
from passes.forms.hamming import Hamming
from passes.plan import plan_by_rules
from passes.substitute import substitute
from rewriter.fit import Recipe, fit
from rewriter.fit_site import refresh
from tests.by_hand import Encoder, canonical

HEADS, D = 2, 8


def clustered(samples: int, tokens: int, seed: int) -> list[tuple[Tensor, Tensor, None]]:
    """Queries and keys around six directions of each head, the same for every seed."""
    fixed = torch.Generator().manual_seed(11)
    centres = torch.randn(HEADS, 6, D, generator=fixed)
    draw = torch.Generator().manual_seed(seed)

    def rows() -> Tensor:
        which = torch.randint(6, (samples, HEADS, tokens), generator=draw)
        heads = torch.arange(HEADS)[None, :, None]
        noise = 0.3 * torch.randn(samples, HEADS, tokens, D, generator=draw)
        return centres[heads, which] + noise

    return [(rows(), rows(), None)]


def score(params: dict[str, Tensor], data: Any, shared: bool) -> float:
    """Agreement with the labels of tokens that were not learned from."""
    q, k = pick(data, HEADS, Learning(), torch.Generator().manual_seed(1), shared)
    codes = [_hash.signs(_hash.projections(x, params)) for x in (q, k)]
    return agreement(codes[0], codes[1], labels(q, k, 10))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("start", ["random", "spectral", "both"])
def test_learned_codes_agree_better_on_new_tokens(shared: bool, start: str) -> None:
    fresh = _hash.initial(HEADS, D, 25, 16)
    how = Learning(start=start)
    learned = learn(fresh, clustered(6, 64, 1), 16, shared=shared, how=how)
    assert {n: p.shape for n, p in learned.items()} == {n: p.shape for n, p in fresh.items()}
    new = clustered(4, 64, 2)
    assert score(learned, new, shared) > score(fresh, new, shared) + 0.04


def test_learning_repeats_and_a_refresh_starts_from_the_old() -> None:
    fresh, data = _hash.initial(HEADS, D, 9, 8), clustered(3, 40, 3)
    first = learn(fresh, data, 8, shared=False)
    again = learn(fresh, data, 8, shared=False)
    assert all(torch.equal(first[n], again[n]) for n in first)
    warm = learn(first, clustered(3, 40, 4), 8, shared=False, warm=True, seed=5)
    for name in ("anchors", "centre", "rate"):
        assert torch.equal(warm[name], first[name])
    assert score(warm, clustered(3, 40, 6), False) > score(fresh, clustered(3, 40, 6), False)


def test_hidden_tokens_teach_nothing() -> None:
    (q, k, _), fresh = clustered(3, 40, 3)[0], _hash.initial(HEADS, D, 9, 8)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[:, 30:] = False
    wild = k.clone()
    wild[:, :, 30:] = 1e6
    a = learn(fresh, [(q, k, mask)], 8, shared=False)
    b = learn(fresh, [(q, wild, mask)], 8, shared=False)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_labels_are_the_nearest_and_the_farthest() -> None:
    x = torch.randn(1, 1, 30, 4)
    marks = labels(x, x, 3)[0, 0]
    order = (x @ x.mT)[0, 0].argsort(-1)
    for i in range(30):
        assert set(marks[i].nonzero().flatten().tolist()) == set(
            order[i, :3].tolist() + order[i, -3:].tolist()
        )
        assert (marks[i, order[i, -3:]] == 1).all()
    few = labels(x[:, :, :3], x[:, :, :3], 10)
    assert few.sum() == 0
    assert few.abs().sum() == 6


@pytest.mark.parametrize("case", ["hidden", "nan"])
def test_useless_data_is_refused(case: str) -> None:
    (q, k, _) = clustered(1, 8, 0)[0]
    mask = torch.zeros(1, 8, dtype=torch.bool) if case == "hidden" else None
    if case == "nan":
        q = q * float("nan")
    with pytest.raises(FitError, match=r"no token|not finite"):
        learn(_hash.initial(HEADS, D, 5, 4), [(q, k, mask)], 4, shared=False)


@pytest.mark.parametrize("bad", [{"start": "best"}, {"top": 0}, {"tokens": 0}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Learning(**bad)


@pytest.fixture
def encoder() -> Any:
    torch.manual_seed(0)
    model = Encoder().eval()
    with torch.no_grad():  # attention that is far from even
        for layer in model.layers:
            layer.attention.k.weight *= 12
            layer.attention.v.weight *= 3
    traced, sites = canonical(model, {"x": torch.randn(4, 24, 16)})
    plan = plan_by_rules(sites, {"*": Hamming({"projection": "separate"})})
    return substitute(traced, sites, plan)


def test_fit_learns_the_hash_and_leaves_it_frozen(encoder: Any, tmp_path: Path) -> None:
    data = [{"x": torch.randn(4, 24, 16)} for _ in range(6)]
    before = {n: p.detach().clone() for n, p in encoder.module.named_parameters()}
    report = fit(encoder, data, seconds=4, state_dir=tmp_path / "state", recipe=Recipe())
    assert report.sites[0].error_after < report.sites[0].error_before
    hashed = [n for n, _ in encoder.module.named_parameters() if ".params." in n]
    assert len(hashed) == 8
    for name, p in encoder.module.named_parameters():
        if name in hashed:
            assert not p.requires_grad
            assert not torch.equal(p, before[name])


def test_refresh_learns_from_the_models_own_activations(encoder: Any) -> None:
    batches = [{"x": torch.randn(4, 24, 16)}]
    old = {n: p.detach().clone() for n, p in encoder.module.named_parameters()}
    sites = refresh(encoder, batches)
    assert sites == [s.id for s in encoder.sites]
    changed = {
        n.rpartition(".")[2]
        for n, p in encoder.module.named_parameters()
        if not torch.equal(p, old[n])
    }
    assert changed == {"mix"}
