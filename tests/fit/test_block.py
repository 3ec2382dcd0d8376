"""The blocks of attention: cut out of the graph, equal to it, and fitted together."""

from __future__ import annotations

import torch

from passes.plan import plan_by_rules
from passes.substitute import substitute
from rewriter.api import find_sites
from rewriter.fit_block import Activations, block_loss, blocks
from rewriter.fit_model import teacher_of
from tests.cli_factories import encoder


def rewritten(form: str):
    model, inputs = encoder()
    traced, found = find_sites(model, inputs)
    return substitute(traced, found.sites, plan_by_rules(found.sites, {"*": form})), inputs


def test_an_exact_block_gives_what_the_original_has() -> None:
    made, inputs = rewritten("exact")
    parts = blocks(made)
    values = Activations(teacher_of(made), parts, [inputs], 1 << 20)(0)
    assert len(parts) == 2
    for part in parts:
        got = part.run(*(values[n] for n in part.inputs))
        torch.testing.assert_close(got, values[part.out], rtol=1e-5, atol=1e-6)
    assert float(block_loss(parts, values, inputs)) < 1e-10


def test_blocks_share_parameters_and_carry_gradients() -> None:
    made, inputs = rewritten("hedgehog")
    parts = blocks(made)
    values = Activations(teacher_of(made), parts, [inputs], 1 << 20)(0)
    loss = block_loss(parts, values, inputs)
    loss.backward()
    assert float(loss) > 1e-6
    for site in made.sites:
        for param in made.attention(site.id).params.values():
            assert param.grad is not None
            assert float(param.grad.abs().sum()) > 0
    trained = [n for n, p in made.module.named_parameters() if p.grad is not None]
    assert not any("linear1" in n or "linear2" in n for n in trained)  # feed-forward stays out
    assert any("in_proj" in n for n in trained)
    assert any("out_proj" in n for n in trained)


def test_kept_activations_say_the_same() -> None:
    made, inputs = rewritten("hedgehog")
    parts = blocks(made)
    kept = Activations(teacher_of(made), parts, [inputs], 1 << 20)
    first, second = block_loss(parts, kept(0), inputs), block_loss(parts, kept(0), inputs)
    torch.testing.assert_close(first, second, rtol=1e-2, atol=0)
    assert kept.held > 0
