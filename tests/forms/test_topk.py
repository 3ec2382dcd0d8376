"""topk: all keys give softmax, ties, the remainder, equal scores, long rows through the kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from passes.errors import UsageError
from passes.form import Reason, form_named
from tests.by_hand import site
from tests.targets.kit_tools import Case, Trial, trial


def inputs(keys: int = 13) -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 4, 13, 6).double()
    return q, torch.randn(2, 2, keys, 6).double(), torch.randn(2, 2, keys, 5).double()


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_all_keys_give_softmax(rest: bool, causal: bool) -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=13, S=13, D=6, E=5, causal=causal, padding=True)
    mask = torch.rand(2, 13) > 0.3
    form, exact = form_named("topk", {"best": 13, "rest": rest}), form_named("exact")
    got = form.attend(form.spec(at), {}, q, k, v, mask)
    want = exact.attend(exact.spec(at), {}, q, k, v, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_without_the_rest_it_is_softmax_over_the_best() -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=13, S=13, D=6, E=5)
    form = form_named("topk", {"best": 4, "rest": False})
    got = form.attend(form.spec(at), {}, q, k, v)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * at.scale
    best = logits.topk(4, -1)
    values = v.repeat_interleave(2, 1)[:, :, None].expand(-1, -1, 13, -1, -1)
    taken = values.gather(3, best.indices[..., None].expand(-1, -1, -1, -1, 5))
    want = (best.values.softmax(-1)[..., None] * taken).sum(-2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_rest_keeps_its_exact_weight_and_the_mean_of_its_values() -> None:
    q, k, _ = inputs()
    at = site(H=4, G=2, T=13, S=13, D=6, E=5)
    form, exact = form_named("topk", {"best": 3}), form_named("exact")
    soft = exact.weights(exact.spec(at), {}, q, k)
    got = form.weights(form.spec(at), {}, q, k)
    chosen = soft >= soft.topk(3, -1).values[..., -1:]
    torch.testing.assert_close(got[chosen], soft[chosen], rtol=1e-12, atol=0)
    share = (soft * ~chosen).sum(-1, keepdim=True) / 10
    torch.testing.assert_close(got[~chosen], share.expand_as(got)[~chosen], rtol=1e-12, atol=0)


def test_with_the_rest_a_flat_head_stays_an_average() -> None:
    q, k, v = inputs(200)
    q, at = 0.01 * q, site(H=4, G=2, T=13, S=200, D=6, E=5)
    exact = form_named("exact")
    want = exact.attend(exact.spec(at), {}, q, k, v)
    errors = [
        float((f.attend(f.spec(at), {}, q, k, v) - want).norm() / want.norm())
        for f in (form_named("topk", {"best": 8, "rest": rest}) for rest in (True, False))
    ]
    assert errors[0] < 0.05
    assert errors[1] > 1.0


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(B=2, H=4, G=2, T=9, S=301, D=12, E=20, key_rows=2),
        Case(T=75, S=90, D=8, E=8, causal=True, key_rows=1),
    ],
    ids=str,
)
def test_kernel_of_a_few_of_many_keys(case: Case, rest: bool) -> None:
    form = form_named("topk", {"best": 7, "rest": rest})
    while True:
        arrays = trial("exact", case, np.random.default_rng()).arrays
        t = Trial(form, case, arrays, {})
        if masked_gap(t, 7) > 1e-6:
            break
    built = t.build()
    np.testing.assert_allclose(t.run(built), t.reference(), atol=2e-5, rtol=0)
    assert dict(built.ops.ops) == dict(form.ops(case.site).ops)


def masked_gap(t: Trial, best: int) -> float:
    """How far the last key that counts is from the first that does not, at all masks."""
    q, k = (torch.from_numpy(t.arrays[n]).double() for n in "qk")
    exact = form_named("exact")
    mask = torch.from_numpy(t.arrays["key_mask"])
    soft = exact.weights(exact.spec(t.case.site), {}, q, k, mask).log()
    top = soft.topk(best + 1, -1).values
    gap = top[..., -2] - top[..., -1]
    return float(gap[top[..., -1] > -torch.inf].min())


@pytest.mark.parametrize("rest", [False, True])
def test_equal_scores_fill_the_list_and_no_more(rest: bool) -> None:
    """All keys alike but one better at the end: it counts, and the first of the others."""
    case = Case(H=1, G=1, T=3, S=40, D=8, E=8)
    t = Trial(
        form_named("topk", {"best": 5, "rest": rest}),
        case,
        trial("exact", case, np.random.default_rng()).arrays,
        {},
    )
    t.arrays["q"] = np.abs(t.arrays["q"])
    t.arrays["k"][:] = 1.0
    t.arrays["k"][:, :, -1] = 1.5
    got, v = t.run()[0, 0], t.arrays["v"][0, 0].astype("float64")
    logits = t.arrays["q"][0, 0].astype("float64") @ t.arrays["k"][0, 0].T / np.sqrt(8)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    if rest:
        want = e[:, :4] @ v[:4] + e[:, -1:] * v[-1] + e[:, 4:-1].sum(-1)[:, None] * v[4:-1].mean(0)
        want /= e.sum(-1, keepdims=True)
    else:
        want = (e[:, :4] @ v[:4] + e[:, -1:] * v[-1]) / (e[:, :4].sum(-1) + e[:, -1])[:, None]
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


ROWS = {
    "peaked": lambda rng, n: 40 * rng.normal(size=n),
    "heavy tails": lambda rng, n: rng.standard_cauchy(size=n),
    "two heaps": lambda rng, n: np.where(rng.random(n) < 0.05, 20.0, 0.0) + rng.normal(size=n),
    "one far below": lambda rng, n: np.where(np.arange(n) == 3, -1e20, rng.normal(size=n)),
    "steps": lambda rng, n: rng.integers(0, 4, size=n),
    "equal": lambda rng, n: np.zeros(n),
    "almost equal": lambda rng, n: 1e-6 * rng.normal(size=n),
}


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_the_search_ends_at_the_right_keys(rows: str, rest: bool) -> None:
    """Logits of many shapes; of equal ones the first count."""
    keys, best, rng = 333, 17, np.random.default_rng()
    case = Case(H=1, G=1, T=1, S=keys, D=1, E=8)
    arrays = trial("exact", case, rng).arrays
    arrays["q"][:] = 1.0
    arrays["k"][0, 0, :, 0] = ROWS[rows](rng, keys)
    form = form_named("topk", {"best": best, "rest": rest})
    got, v = Trial(form, case, arrays, {}).run()[0, 0, 0], arrays["v"][0, 0].astype("float64")
    logits = arrays["k"][0, 0, :, 0].astype("float64")
    chosen = np.zeros(keys, bool)
    chosen[np.argsort(-logits, kind="stable")[:best]] = True
    e = np.exp(logits - logits.max())
    want = e[chosen] @ v[chosen]
    total = e[chosen].sum()
    if rest:
        want, total = want + e[~chosen].sum() * v[~chosen].mean(0), e.sum()
    np.testing.assert_allclose(got, want / total, atol=2e-5, rtol=0)


def test_margin_is_the_gap_at_the_border() -> None:
    form, at = form_named("topk", {"best": 1}), site(B=1, H=1, G=1, T=1, S=3, D=1, scale=1.0)
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 5.0, 3.0])[None, None, :, None]
    assert form.margin(form.spec(at), {}, q, k) == pytest.approx(2.0)
    all_keys = form_named("topk", {"best": 3})
    assert all_keys.margin(all_keys.spec(at), {}, q, k) == float("inf")


def test_which_masks_it_takes() -> None:
    rest, best = form_named("topk"), form_named("topk", {"rest": False})
    for facts, reason in (
        ({"bias": True}, Reason.MASK_BIAS),
        ({"window": (1, 1)}, Reason.MASK_WINDOW),
        ({"unknown": True}, Reason.MASK_UNKNOWN),
    ):
        assert rest.applies(site(**facts)).reason is reason
        assert best.applies(site(**facts))


@pytest.mark.parametrize("config", [{"best": 0}, {"best": True}, {"rest": 1}])
def test_bad_options(config: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(config))):
        form_named("topk", config)
