"""Long sequences: attention weights are formed for a part of them only."""

from __future__ import annotations

import pytest
import torch

from rewriter import fit_site
from rewriter.capture import Call, capture
from rewriter.fit import Recipe, fit
from rewriter.fit_model import teacher_of
from tests.fit.models import batches, rewritten


def first_call(form: str) -> tuple[torch.nn.Module, Call]:
    made = rewritten(form=form)
    site = made.plan.rewritten[0]
    (call,) = capture(teacher_of(made), batches(1, 3), [site], 1 << 24)[site]
    return made.attention(site), call


def test_a_long_call_is_cut_to_tokens_that_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, call = first_call("hedgehog")
    assert fit_site.shortened(attention, call) is call
    monkeypatch.setattr(fit_site, "LONGEST", 8)
    part = fit_site.shortened(attention, call, 3)
    assert torch.equal(part.q, call.q[:, :, 3:11])
    assert part.key_mask is not None
    q, k, v = (x.double() for x in (part.q, part.k, part.v))
    logits = (q @ k.transpose(-1, -2)) * attention.spec.scale
    logits = logits.masked_fill(~part.key_mask[:, None, None, :], -torch.inf)
    want = logits.softmax(-1) @ v
    seen = part.key_mask.any(-1)
    torch.testing.assert_close(part.out[seen].double(), want[seen], rtol=1e-4, atol=1e-5)


def test_a_form_with_a_length_of_its_own_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, call = first_call("linformer")
    monkeypatch.setattr(fit_site, "LONGEST", 8)
    assert fit_site.shortened(attention, call) is call


def test_a_fit_on_cut_sequences_still_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_site, "LONGEST", 8)
    made = rewritten()
    recipe = Recipe(site_steps=30, block_steps=20, end_steps=10)
    report = fit(made, batches(8, 1), seconds=600.0, held_out=batches(3, 2), recipe=recipe)
    assert all(s.divergence_after < s.divergence_before for s in report.sites)
    assert report.fidelity.relative_error < report.fidelity_before.relative_error


def test_a_part_that_is_all_padding_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter.fit_loss import divergence, output_error

    attention, call = first_call("hedgehog")
    assert call.key_mask is not None
    call.key_mask[0, 10:] = False
    monkeypatch.setattr(fit_site, "LONGEST", 8)
    part = fit_site.shortened(attention, call, 12)
    assert part.key_mask is not None
    assert not bool(part.key_mask[0].any())
    gap, error = divergence(attention, part), output_error(attention, part)
    (gap + error).backward()
    assert bool(torch.isfinite(gap))
    assert bool(torch.isfinite(error))
    grads = [p.grad for p in attention.params.values() if p.grad is not None]
    assert grads
    assert all(bool(torch.isfinite(g).all()) for g in grads)
