"""hamming: codes, Hamming distances, the linear form against the quadratic one, the options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from passes.errors import UsageError
from passes.form import Reason, form_named
from passes.forms import _hash
from passes.forms.hamming import Hamming, HammingConfig
from passes.opcount import OpCount
from passes.plan import plan_by_rules
from passes.rewire import ALL_TOKENS, SHARED, rewired
from passes.site import AttentionSite, SiteStatus
from tests.by_hand import site


def tensors(at: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
    d = at.dims
    q = torch.randn(int(d.B), d.H, int(d.T), d.D).double()
    k = torch.randn(int(d.B), d.G, int(d.S), d.D).double()
    return q, k, torch.randn(int(d.B), d.G, int(d.S), d.E).double()


def params_of(form: Hamming, at: AttentionSite) -> dict[str, Tensor]:
    return {n: p.double() for n, p in form.init_params(at).items()}


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Hamming distances [.., T, S] of codes by packed words: the bits of an exclusive or."""
    weights = 2 ** torch.arange(a.shape[-1])
    packed = [((c > 0).long() * weights).sum(-1) for c in (a, b)]
    different = packed[0][..., :, None] ^ packed[1][..., None, :]
    return sum((different >> r) & 1 for r in range(a.shape[-1]))  # type: ignore[return-value]


@pytest.mark.parametrize("bits", [1, 7, 16, 48])
def test_inner_product_of_codes_is_bits_minus_twice_the_distance(bits: int) -> None:
    at = site(T=9, D=6)
    form = Hamming({"bits": bits})
    q, k, _ = tensors(at)
    a, b = (form.codes(x, params_of(form, at)) for x in (q, k))
    assert set(torch.cat([a, b]).unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(a @ b.transpose(-1, -2), (bits - 2 * distance(a, b)).double())


@pytest.mark.parametrize("beta", [0, 32])
def test_weights_by_distance(beta: int) -> None:
    at = site(T=11, S=8, H=4, G=2)
    form = Hamming({"beta": beta})
    q, k, v = tensors(at)
    params = params_of(form, at)
    a, b = form.codes(q, params), form.codes(k, params).repeat_interleave(2, 1)
    similar = 16 - 2 * distance(a, b).double() + (beta or 17)
    assert similar.min() >= 1
    want = similar / similar.sum(-1, keepdim=True)
    torch.testing.assert_close(form.weights(form.spec(at), params, q, k), want, rtol=0, atol=1e-14)
    out = form.attend(form.spec(at), params, q, k, v)
    torch.testing.assert_close(out, want @ v.repeat_interleave(2, 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"padding": True}])
def test_own_value_by_the_released_formula(mask: dict[str, Any]) -> None:
    at = site(T=9, H=4, G=2, **mask)
    form = Hamming({"constant": "own_value"})
    q, k, v = tensors(at)
    params = params_of(form, at)
    seen = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    key_mask = None
    if mask.get("padding"):
        key_mask = torch.tensor([[True] * 6 + [False] * 3, [False] * 2 + [True] * 7])
        seen = key_mask[:, None, None].expand(2, 1, 9, 9)
        v = v * key_mask[:, None, :, None]  # a hidden token has no value of its own
    if mask.get("causal"):
        seen = seen.tril()
    codes = form.codes(q, params) @ form.codes(k, params).repeat_interleave(2, 1).mT
    inner, values = codes * seen, v.repeat_interleave(2, 1)
    want = inner @ values + 17 * values
    want = want / (inner.sum(-1, keepdim=True) + 17 * seen.sum(-1, keepdim=True))
    out = form.attend(form.spec(at), params, q, k, v, key_mask)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_hash_is_a_kernel_machine_on_unit_rows() -> None:
    at = site(T=5, H=2, G=1, D=4)
    form = Hamming({"bits": 5, "anchors": 3})
    params = params_of(form, at)
    x = tensors(at)[0]
    got = _hash.projections(x, params)
    sigma = 0.5 / params["rate"][0]
    for b in range(2):
        for h in range(2):
            for i in range(5):
                row = x[b, h, i] / x[b, h, i].norm()
                gap = (row[:, None] - params["anchors"][0]).square().sum(0)
                kernel = (-gap / (2 * sigma)).exp() - params["centre"][0]
                torch.testing.assert_close(got[b, h, i], kernel @ params["mix"][0])


def test_a_token_does_not_depend_on_others_or_on_its_length() -> None:
    at = site(T=6)
    form = Hamming()
    q = tensors(at)[0]
    params = params_of(form, at)
    whole = form.codes(q, params)
    assert torch.equal(form.codes(q[:1, :, 2:3], params), whole[:1, :, 2:3])
    assert torch.equal(form.codes(5 * q, params), whole)


def test_a_row_of_zeros_is_finite_and_has_finite_gradients() -> None:
    at = site(T=4)
    form = Hamming()
    q, k, v = tensors(at)
    q[:, :, 1] = 0
    q.requires_grad_()
    out = form.attend(form.spec(at), params_of(form, at), q, k, v)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_the_straight_through_window() -> None:
    u = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    s = _hash.signs(u)
    assert s.tolist() == [-1, -1, -1, -1, 1, 1, 1]  # sign(0) is -1
    s.sum().backward()
    assert u.grad is not None
    assert u.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bits": 0}, "bits"),
        ({"bits": 65}, "bits"),
        ({"anchors": 0}, "anchors"),
        ({"beta": 16}, "at least bits \\+ 1 = 17"),
        ({"beta": float("nan")}, "beta"),
        ({"constant": "none"}, "sum or own_value"),
        ({"projection": "both"}, "shared or separate"),
        ({"start": "best"}, "random or spectral or both"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Hamming(options)


def test_what_is_refused_and_what_is_shared() -> None:
    own = Hamming({"constant": "own_value"})
    assert own.applies(site(T=4, S=6)).reason is Reason.CROSS
    assert own.applies(site(T=6))
    assert Hamming().rewires(site(T=6)) == (SHARED,)
    assert Hamming().rewires(site(T=6, S=5)) == ()
    assert Hamming().rewires(site(T=6, H=4, G=2)) == ()
    assert Hamming({"projection": "separate"}).rewires(site(T=6)) == ()


def reduced(tokens: int, keys: int) -> AttentionSite:
    from dataclasses import replace

    at = site(T=tokens, S=keys)
    return replace(at, id=f"stage.{tokens}#0", reduced=keys < tokens)


def test_the_last_stage_of_a_pyramid_is_spared_by_a_rule_for_all() -> None:
    sites = [reduced(64, 4), reduced(16, 4), reduced(4, 4)]
    plan = plan_by_rules(sites, {"*": "hamming"})
    statuses = [c.status for c in plan.choices.values()]
    assert statuses == [SiteStatus.REWRITTEN] * 2 + [SiteStatus.KEPT]
    assert "last stage" in plan["stage.4#0"].why
    assert plan_by_rules(sites, {"stage*": "hamming"})["stage.4#0"].form == "hamming"
    assert Hamming().rewires(sites[0]) == (ALL_TOKENS, SHARED)
    flat = [site(T=4), site(T=8)]
    assert all(not Hamming().spares(s, flat) for s in flat)


def test_the_papers_count_of_one_layer() -> None:
    """PVTv2-B0, first stage: 3136 tokens, one head of 32."""
    at = site(B=1, H=1, T=3136, D=32)
    form = form_named("hamming")
    count = form.counted(rewired(at, form.rewires(at)))
    assert (count.total("mul"), count.total("add")) == (1_564_864, 9_683_968)
    exact = form_named("exact").counted(at)
    assert (exact.total("mul"), exact.total("add")) == (639_242_240, 629_407_744)


def test_shared_codes_are_hashed_once() -> None:
    at = site(B=1, T=64)
    form = Hamming()
    apart, shared = form.ops(at), form.ops(rewired(at, (SHARED,)))
    assert apart.total("exp") == 2 * shared.total("exp") == 2 * 4 * 64 * 25
    assert isinstance(apart, OpCount)
    assert HammingConfig().constant_term == 17


def test_learning_starts_where_the_option_says() -> None:
    """The bits of different starts differ, each repeats, and anchors do not depend on it."""
    at = site(B=1, H=2, G=2, T=24, D=6)
    data = [(torch.randn(2, 2, 24, 6), torch.randn(2, 2, 24, 6), None) for _ in range(2)]
    found = {}
    for start in ("random", "spectral", "both"):
        form = Hamming({"start": start, "bits": 3, "anchors": 7})
        found[start] = form.learn(at, form.init_params(at), data)
        assert torch.equal(form.learn(at, form.init_params(at), data)["mix"], found[start]["mix"])
    assert torch.equal(found["random"]["anchors"], found["spectral"]["anchors"])
    assert not torch.equal(found["random"]["mix"], found["spectral"]["mix"])
