"""The start of a form: a scale for each head, chosen by the divergence of its weights."""

from __future__ import annotations

import torch

from rewriter.capture import capture
from rewriter.fit_loss import divergence, head_divergences
from rewriter.fit_model import teacher_of
from rewriter.fit_site import choose_scale
from tests.fit.models import batches, encoder, rewritten

SCALES = (1.0, 2.0, 3.0, 5.0)


def uneven() -> torch.nn.Module:
    """Heads from nearly uniform to sharp attention."""
    model = encoder(layers=1)
    with torch.no_grad():
        for head, factor in enumerate((0.1, 1.0, 2.0, 4.0)):
            model.blocks[0].q.weight[8 * head : 8 * head + 8].mul_(factor)
    return model


def test_each_head_gets_the_scale_that_is_best_for_it() -> None:
    made = rewritten(uneven())
    (site,) = made.plan.rewritten
    attention = made.attention(site)
    calls = capture(teacher_of(made), batches(3, 7), [site], 1 << 24)[site]
    fresh = {n: p.detach().clone() for n, p in attention.params.items()}
    chosen = choose_scale(attention, calls, SCALES)
    assert len(set(chosen.tolist())) > 1
    with torch.no_grad():
        best = sum(float(divergence(attention, c)) for c in calls)
        for scale in SCALES:
            for name, param in attention.params.items():
                param.copy_(fresh[name] * scale)
            assert best < sum(float(divergence(attention, c)) for c in calls)


def test_divergence_is_the_mean_of_its_heads() -> None:
    made = rewritten()
    site = made.plan.rewritten[0]
    (call,) = capture(teacher_of(made), batches(1, 8), [site], 1 << 24)[site]
    heads = head_divergences(made.attention(site), call)
    assert heads.shape == (4,)
    assert bool((heads > 0).all())
    torch.testing.assert_close(divergence(made.attention(site), call), heads.mean())


def test_a_parameter_that_is_not_by_head_gets_one_scale() -> None:
    made = rewritten(uneven())
    (site,) = made.plan.rewritten
    attention = made.attention(site)
    attention.params["shared"] = torch.nn.Parameter(torch.ones(()))
    calls = capture(teacher_of(made), batches(2, 9), [site], 1 << 24)[site]
    assert len(set(choose_scale(attention, calls, SCALES).tolist())) == 1


def test_nothing_finite_leaves_the_start_as_it_was() -> None:
    made = rewritten()
    site = made.plan.rewritten[0]
    attention = made.attention(site)
    calls = capture(teacher_of(made), batches(1, 9), [site], 1 << 24)[site]
    before = attention.params["w_q"].detach().clone()
    assert choose_scale(attention, calls, (float("nan"),)).tolist() == [1.0] * 4
    assert torch.equal(attention.params["w_q"], before)
