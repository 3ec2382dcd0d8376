"""kv_symmetric: in a model its queries are its keys, so its scores are symmetric."""

from __future__ import annotations

from dataclasses import replace

import torch

from passes.form import Reason, form_named
from passes.plan import plan_by_rules
from passes.site import Mask
from passes.substitute import Rewritten, substitute
from tests.by_hand import Encoder, canonical, site


def rewritten() -> Rewritten:
    x = torch.randn(2, 7, 16)
    traced, sites = canonical(Encoder().eval(), {"x": x}, Mask())
    return substitute(traced, sites, plan_by_rules(sites, {"*": "kv_symmetric"}))


def seen_by(model: Rewritten, x: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """q and k of every site."""
    got: list[tuple[torch.Tensor, ...]] = []
    for one in model.sites:
        model.attention(one.id).register_forward_hook(lambda m, args, out: got.append(args[:2]))
    model.module(x=x)
    return got


def test_queries_are_keys_and_scores_symmetric() -> None:
    model = rewritten()
    sides = seen_by(model, torch.randn(2, 7, 16))
    assert len(sides) == 2
    for (q, k), one in zip(sides, model.sites, strict=True):
        torch.testing.assert_close(q, k, rtol=0, atol=0)
        attention = model.attention(one.id)
        assert attention.site.shared
        weights = attention.form.weights(attention.spec, {}, q.double(), k.double())
        scores = weights.log() - torch.diagonal(weights.log(), dim1=2, dim2=3)[..., None]
        scores = scores + (q.double() ** 2).sum(-1, keepdim=True) * one.scale
        torch.testing.assert_close(scores, scores.transpose(-1, -2), rtol=0, atol=1e-6)


def test_a_projection_is_saved_and_comes_back_with_a_revert() -> None:
    model, x = rewritten(), torch.randn(2, 7, 16)
    model.module(x=x).square().sum().backward()
    grads = {n for n, p in model.module.named_parameters() if p.grad is not None}
    assert any(".q." in n for n in grads)
    assert not any(".k." in n for n in grads)
    before = model.module(x=x)
    for one in model.sites:
        model.put(one.id, form_named("exact"))
    want = model.traced.module(x=x)
    torch.testing.assert_close(model.module(x=x), want, rtol=1e-5, atol=1e-6)
    assert (before - want).abs().max() > 1e-3


def test_refusals() -> None:
    form, at = form_named("kv_symmetric"), site(T=4, S=4)
    assert form.applies(at)
    assert form.applies(replace(at, cross=True)).reason is Reason.CROSS
    assert form.applies(site(T=4, S=6)).reason is Reason.CROSS
    assert form.applies(site(H=4, G=2)).reason is Reason.GROUPED
