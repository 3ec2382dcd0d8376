"""lolcats: block sums equal the explicit form; its two limits are softmax and linear attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from passes.errors import FormError, UsageError
from passes.form import Form, Reason, form_named
from passes.site import AttentionSite
from tests.by_hand import site


def made(
    tokens: int, config: dict[str, Any], **facts: Any
) -> tuple[Form, AttentionSite, dict[str, Tensor], tuple[Tensor, ...]]:
    form = form_named("lolcats", config)
    at = site(B=2, H=4, G=2, T=tokens, D=6, E=3, **facts)
    params = {n: p.double() + 0.3 * torch.randn_like(p).double()
              for n, p in form.init_params(at).items()}  # fmt: skip
    q, k = 2 * torch.randn(2, 4, tokens, 6).double(), torch.randn(2, 2, tokens, 6).double()
    return form, at, params, (q, k, torch.randn(2, 2, tokens, 3).double())


def explicit(params: dict[str, Tensor], at: AttentionSite, window: int, q: Tensor, k: Tensor,
             v: Tensor, key_mask: Tensor | None) -> Tensor:  # fmt: skip
    """One query and key at a time, as the paper writes it."""

    def phi(x: Tensor, w: Tensor) -> Tensor:
        y = at.scale**0.5 * x @ w
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)

    out = torch.zeros(*q.shape[:3], v.shape[3]).double()
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        g, top, total = h // 2, torch.zeros(3).double(), torch.tensor(0.0).double()
        last = i + 1 if at.mask.causal else q.shape[2]
        keys = [j for j in range(last) if key_mask is None or key_mask[b, j]]
        near = [j for j in keys if abs(i // window - j // window) <= 1]
        logits = {j: at.scale * q[b, h, i] @ k[b, g, j] for j in near}
        peak = max(logits.values()) if near else torch.tensor(0.0)
        for j in keys:
            if j in logits:
                weight = params["mix"][h].sigmoid() * (logits[j] - peak).exp()
            else:
                weight = phi(q[b, h, i], params["w_q"][h]) @ phi(k[b, g, j], params["w_k"][g])
            top, total = top + weight * v[b, g, j], total + weight
        out[b, h, i] = top / total.clamp_min(1e-12)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("tokens", [12, 17])
def test_block_sums_equal_the_explicit_form(causal: bool, padding: bool, tokens: int) -> None:
    form, at, params, qkv = made(
        tokens, {"window": 4, "feature_dim": 3}, causal=causal, padding=padding
    )
    key_mask = torch.rand(2, tokens) > 0.5 if padding else None
    got = form.attend(form.spec(at), params, *qkv, key_mask)
    want = explicit(params, at, 4, *qkv, key_mask)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_up_to_two_blocks_it_is_softmax(causal: bool) -> None:
    form, at, params, qkv = made(20, {"window": 10}, causal=causal)
    exact = form_named("exact")
    want = exact.attend(exact.spec(at), {}, *qkv)
    torch.testing.assert_close(form.attend(form.spec(at), params, *qkv), want)
    assert form.ops(at) == exact.ops(at)
    given = {n: p.requires_grad_() for n, p in params.items()}
    form.attend(form.spec(at), given, *qkv).sum().backward()  # a fit may meet such a call
    assert all(p.grad is not None and (p.grad == 0).all() for p in given.values())
    longer = made(21, {"window": 10}, causal=causal)
    got = longer[0].attend(longer[0].spec(longer[1]), longer[2], *longer[3])
    assert not torch.allclose(got, exact.attend(exact.spec(longer[1]), {}, *longer[3]), rtol=1e-3)


def test_the_gate_moves_between_window_and_remainder() -> None:
    form, at, params, qkv = made(24, {"window": 4})
    weights = {}
    for name, mix in (("linear", -60.0), ("both", 0.0), ("window", 60.0)):
        params["mix"] = torch.full((4,), mix).double()
        weights[name] = form.weights(form.spec(at), params, *qkv[:2])
    block = torch.arange(24) // 4
    near = (block[:, None] - block).abs() <= 1
    share = {n: float((w * near).sum(-1).mean()) for n, w in weights.items()}
    assert share["linear"] < 1e-9
    assert share["linear"] < share["both"] < share["window"]
    params["mix"] = torch.full((4,), -60.0).double()
    hedgehog = form_named("hedgehog")
    maps = {n: params[n] for n in ("w_q", "w_k")}
    linear = hedgehog.weights(hedgehog.spec(at), maps, *qkv[:2]).masked_fill(near, 0.0)
    want = linear / linear.sum(-1, keepdim=True)
    torch.testing.assert_close(weights["linear"], want, rtol=1e-6, atol=1e-9)


def test_time_is_linear_in_the_tokens() -> None:
    form = form_named("lolcats")
    for causal in (False, True):
        counts = [form.ops(site(T=t, D=64, causal=causal)).total() for t in (4096, 8192, 16384)]
        assert counts[2] == pytest.approx(2 * counts[1], rel=1e-2)
        exact = form_named("exact").ops(site(T=16384, D=64, causal=causal)).total()
        assert counts[2] < exact / 10


def test_a_fit_beats_window_and_remainder_alone() -> None:
    at = site(B=2, H=2, T=48, D=8)
    form, exact = form_named("lolcats", {"window": 6}), form_named("exact")
    made_by = torch.Generator().manual_seed(8)
    q, k, v = (1.3 * torch.randn(2, 2, 48, 8, generator=made_by) for _ in range(3))
    want = exact.attend(exact.spec(at), {}, q, k, v)
    params = {n: torch.nn.Parameter(p) for n, p in form.init_params(at).items()}
    optimiser = torch.optim.Adam(params.values(), lr=2e-2)

    def error(mix: float | None = None) -> Tensor:
        given: dict[str, Tensor] = dict(params)
        if mix is not None:
            given["mix"] = torch.full((2,), mix)
        return (form.attend(form.spec(at), given, q, k, v) - want).square().mean()

    for _ in range(60):
        optimiser.zero_grad()
        error().backward()
        optimiser.step()
    with torch.no_grad():
        assert error() < 0.8 * min(error(-60.0), error(60.0))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"T": 5, "S": 7}, Reason.CROSS),
        ({"bias": True}, Reason.MASK_BIAS),
        ({"window": (4, 4)}, Reason.MASK_WINDOW),
        ({"H": 4, "G": 3}, Reason.GROUPED),
    ],
)
def test_refusals(facts: dict[str, Any], reason: Reason) -> None:
    assert form_named("lolcats").applies(site(**facts)).reason is reason


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="window"):
        form_named("lolcats", {"window": 0})
    with pytest.raises(UsageError, match="feature_dim"):
        form_named("lolcats", {"feature_dim": -1})
    form, at, params, (q, k, v) = made(6, {})
    with pytest.raises(FormError, match="5 queries and 6 keys"):
        form.attend(form.spec(at), params, q[:, :, :5], k, v)
