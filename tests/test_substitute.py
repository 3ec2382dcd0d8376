"""Sites become modules: same function for exact, trains, swaps, copies, saves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.errors import FormError, InputError, PlanError, UnmatchedRule
from passes.form import form_named
from passes.plan import KEEP, Choice, Plan, plan_by_rules
from passes.site import AttentionSite, Mask, SiteStatus
from passes.substitute import AttentionModule, Rewritten, revert, substitute
from passes.traced import Traced
from tests.by_hand import SDPA, Encoder, canonical, site

PADDED = Mask(padding=True)


def encoder(train: bool = False, **options: Any) -> tuple[Encoder, dict[str, Tensor]]:
    x, mask = torch.randn(3, 7, 16), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2, :3] = False
    return Encoder(**options).train(train), {"x": x, "mask": mask}


def rewritten(
    form: str, groups: int = 4, rules: dict[str, str] | None = None
) -> tuple[Rewritten, dict[str, Tensor], Traced, list[AttentionSite]]:
    model, inputs = encoder(groups=groups)
    traced, sites = canonical(model, inputs, PADDED)
    plan = plan_by_rules(sites, rules or {"*": form})
    return substitute(traced, sites, plan), inputs, traced, sites


def fresh_inputs() -> dict[str, Tensor]:
    return encoder()[1]


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_a_kept_model_computes_what_it_did(groups: int) -> None:
    model, inputs = encoder(groups=groups)
    traced, sites = canonical(model, inputs, PADDED)
    made = substitute(traced, sites, Plan({}))
    for values in (inputs, fresh_inputs()):
        torch.testing.assert_close(made.module(**values), model(**values))
    assert [n.target for n in made.module.graph.nodes if n.op == "call_module"] == [
        "attention.layers_0_attention_0",
        "attention.layers_1_attention_0",
    ]
    assert not [n for n in made.module.graph.nodes if n.target is SDPA]
    for s in sites:
        assert made.attention(s.id).form.name == "exact"
        assert made.attention(s.id).site == s
    labels = [n.meta.get("attention_site") for n in made.module.graph.nodes]
    assert [s for s in labels if s is not None] == list(made.sites)


def test_sites_that_share_a_mask_share_the_key_mask() -> None:
    model, inputs = encoder()
    traced, sites = canonical(model, inputs, PADDED)
    made = substitute(traced, sites[::-1], Plan({}))
    calls = [n for n in made.module.graph.nodes if n.op == "call_module"]
    assert calls[0].args[3] is calls[1].args[3]
    torch.testing.assert_close(made.module(**inputs), model(**inputs))


def test_the_traced_model_is_not_touched() -> None:
    made, inputs, traced, _ = rewritten("hedgehog")
    before = traced.module(**inputs).clone()
    with torch.no_grad():
        for p in made.module.parameters():
            p.zero_()
    torch.testing.assert_close(traced.module(**inputs), before, rtol=0, atol=0)
    assert [n for n in traced.module.graph.nodes if n.target is SDPA]


@pytest.mark.parametrize("name", ["elu", "hedgehog"])
def test_a_form_changes_its_site_only(name: str) -> None:
    made, inputs, traced, sites = rewritten(name, rules={"layers.1.*": name})
    assert made.attention(sites[0].id).form.name == "exact"
    assert made.attention(sites[1].id).form.name == name
    assert (made.module(**inputs) - traced.module(**inputs)).abs().max() > 1e-3


def test_gradients_reach_form_and_base_weights() -> None:
    made, inputs, _, sites = rewritten("hedgehog", groups=2)
    made.module.train()
    target = torch.randn(3, 7, 16)
    optimiser = torch.optim.Adam(made.module.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = (made.module(**inputs) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    used = {n for n, p in made.module.named_parameters() if p.grad is not None}
    assert {f"attention.layers_{i}_attention_0.params.w_{x}" for i in (0, 1) for x in "qk"} <= used
    assert "layers.0.attention.o.weight" in used
    assert losses[-1] < 0.9 * losses[0]
    grad = made.attention(sites[0].id).params["w_k"].grad
    assert grad is not None
    assert grad.abs().max() > 0


def test_tied_weights_stay_tied() -> None:
    made, _, _, _ = rewritten("hedgehog")
    names = [n for n, _ in made.module.named_parameters(remove_duplicate=False)]
    q = [n for n in names if n.endswith("attention.q.weight")]
    assert len(q) == 2
    assert made.module.get_parameter(q[0]) is made.module.get_parameter(q[1])


def test_state_dict_round_trip() -> None:
    made, inputs, traced, sites = rewritten("hedgehog")
    with torch.no_grad():
        for p in made.module.parameters():
            p += 0.1 * torch.randn_like(p)
    other = substitute(traced, sites, made.plan)
    assert (other.module(**inputs) - made.module(**inputs)).abs().max() > 1e-3
    other.module.load_state_dict(made.module.state_dict())
    torch.testing.assert_close(other.module(**inputs), made.module(**inputs), rtol=0, atol=0)


def test_deepcopy_is_independent_and_still_checks_its_inputs() -> None:
    made, inputs, _, sites = rewritten("hedgehog")
    want = made.module(**inputs)
    twin = copy.deepcopy(made)
    torch.testing.assert_close(twin.module(**inputs), want, rtol=0, atol=0)
    with torch.no_grad():
        twin.attention(sites[0].id).params["w_q"].mul_(-3.0)
    twin.put(sites[1].id, form_named("elu"))
    torch.testing.assert_close(made.module(**inputs), want, rtol=0, atol=0)
    assert made.plan[sites[1].id].form == "hedgehog"
    for one in (made, twin):
        with pytest.raises(InputError):
            one.module(x=torch.randn(16), mask=inputs["mask"])


def test_put_and_revert_swap_in_place() -> None:
    made, inputs, traced, sites = rewritten("hedgehog")
    made.module.train()
    first, second = sites[0].id, sites[1].id
    module = made.put(first, form_named("elu"), why="trying")
    assert made.attention(first) is module
    assert module.training
    assert made.plan[first] == Choice("elu", {}, SiteStatus.REWRITTEN, "trying")
    for one in (first, second):
        revert(made, one, why="too far off")
        assert made.plan[one] == Choice(KEEP, {}, SiteStatus.REVERTED, "too far off")
    assert made.plan.rewritten == []
    torch.testing.assert_close(made.module(**inputs), traced.module(**inputs))
    revert(made, first)
    assert made.plan[first].status is SiteStatus.REVERTED
    made.put(first, form_named("hedgehog"))
    assert made.plan.rewritten == [first]


def test_a_reverted_plan_substitutes_as_kept() -> None:
    made, inputs, traced, sites = rewritten("elu")
    revert(made, sites[0].id)
    again = substitute(traced, sites, made.plan)
    assert again.attention(sites[0].id).form.name == "exact"
    torch.testing.assert_close(again.module(**inputs), made.module(**inputs))


def test_wrong_use_is_explained() -> None:
    made, _, traced, sites = rewritten("elu")
    with pytest.raises(UnmatchedRule, match=r"no site 'nowhere'.*layers\.0"):
        made.attention("nowhere")
    with pytest.raises(UnmatchedRule, match="nowhere"):
        made.put("nowhere", form_named("elu"))
    plan = Plan({"nowhere": Choice("elu")})
    with pytest.raises(UnmatchedRule, match="nowhere"):
        substitute(traced, sites, plan)
    with pytest.raises(PlanError, match="not in the graph"):
        substitute(traced, [site()], Plan({}))
    with pytest.raises(FormError, match=r"elu can not stand at block.0.attention#0: M01"):
        AttentionModule(site(bias=True), form_named("elu"))


class Masked(nn.Module):
    """One attention whose mask is made by `shape`."""

    def __init__(self, shape: str, causal: bool) -> None:
        super().__init__()
        self.shape, self.causal = shape, causal
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        keep = mask
        if self.shape.startswith("b1ts"):
            keep = mask[:, None, None, :].expand(-1, 1, q.shape[2], -1)
            if self.causal:
                keep = keep & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        elif self.shape.startswith("b11s"):
            keep = mask[:, None, None, :]
        elif self.shape.startswith("bhts"):
            keep = mask[:, None, None, :].expand(-1, q.shape[1], q.shape[2], -1)
        elif self.shape.startswith("hts"):
            keep = mask[:1, None, :].expand(q.shape[1], q.shape[2], -1)
        elif self.shape.startswith("ts"):
            keep = mask[:1].expand(q.shape[2], -1)
        elif self.shape.startswith("1s"):
            keep = mask[:1]
        if "float" in self.shape:
            hidden = torch.finfo(q.dtype).min if "min" in self.shape else -10000.0
            keep = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, hidden)
        return F.scaled_dot_product_attention(self.scale * q, k, v, attn_mask=keep)


SHAPES = ["b11s", "b1ts", "bhts", "hts", "ts", "1s", "b11s float", "b1ts float min", "ts float"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_key_mask_is_cut_out_of_any_mask(shape: str) -> None:
    check_key_mask(shape, Mask(padding=True), causal=False)


@pytest.mark.parametrize("shape", ["b1ts", "b1ts float", "b1ts float min"])
def test_causal_and_padding_come_apart(shape: str) -> None:
    check_key_mask(shape, Mask(padding=True, causal=True), causal=True)


def check_key_mask(shape: str, facts: Mask, *, causal: bool) -> None:
    def inputs() -> tuple[Tensor, ...]:
        mask = torch.ones(3, 6, dtype=torch.bool)
        mask[:, 3 + int(torch.randint(3, ())) :] = False
        return (*(torch.randn(3, 2, 6, 4) for _ in range(3)), mask)

    model = Masked(shape, causal)
    traced, sites = canonical(model, inputs(), facts)
    made = substitute(traced, sites, Plan({}))
    seen: list[tuple[Any, ...]] = []
    made.attention(sites[0].id).register_forward_pre_hook(lambda m, args: seen.append(args))
    for _ in range(3):
        values = inputs()
        torch.testing.assert_close(made.module(*values), model(*values))
        _, _, _, key_mask, bias = seen[-1]
        assert bias is None
        want = values[3] if shape.startswith("b") else values[3][:1]
        assert key_mask.dtype == torch.bool
        assert key_mask.shape == want.shape
        assert (key_mask == want).all()


class Windowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        row, column = torch.arange(8)[:, None], torch.arange(8)[None]
        near = (column <= row) & (column >= row - 2)
        keep = near[None, None] & mask[:, None, None, :]
        return F.scaled_dot_product_attention(self.scale * q, k, v, attn_mask=keep)


def test_a_window_hides_no_padding() -> None:
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    values = (*(torch.randn(2, 2, 8, 4) for _ in range(3)), mask)
    model = Windowed()
    traced, sites = canonical(model, values, Mask(padding=True, causal=True, window=(2, 0)))
    made = substitute(traced, sites, Plan({}))
    torch.testing.assert_close(made.module(*values), model(*values))


@pytest.mark.parametrize("facts", [Mask(bias=True), Mask(unknown=True)])
def test_bias_goes_through_as_it_is(facts: Mask) -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 2, 5, 5))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.table, scale=1.0)

    model, values = Biased(), tuple(torch.randn(2, 2, 5, 4) for _ in range(3))
    traced, sites = canonical(model, values, facts)
    made = substitute(traced, sites, Plan({}))
    torch.testing.assert_close(made.module(*values), model(*values))
    made.module(*values).square().sum().backward()
    assert made.module.get_parameter("table").grad is not None


def test_a_missing_mask_tensor_is_an_error() -> None:
    model, _ = encoder()
    traced, sites = canonical(model, {"x": torch.randn(1, 4, 16)}, PADDED)
    with pytest.raises(FormError, match="no tensor"):
        substitute(traced, sites, Plan({}))


def test_dropout_of_exact_follows_the_mode() -> None:
    model, inputs = encoder()
    traced, sites = canonical(model, inputs, PADDED, dropout=0.4)
    made = substitute(traced, sites, plan_by_rules(sites, {"layers.1.*": "elu"}))
    exact = made.attention(sites[0].id)
    q, k, v = (torch.randn(3, 4, 7, 4) for _ in range(3))
    assert torch.equal(exact(q, k, v), exact(q, k, v))
    made.module.train()
    assert not torch.equal(exact(q, k, v), exact(q, k, v))
    elu = made.attention(sites[1].id)
    assert torch.equal(elu(q, k, v), elu(q, k, v))


def test_dynamic_sizes_still_run() -> None:
    model, inputs = encoder()
    axes = {"x": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}}
    traced, sites = canonical(model, inputs, PADDED, dynamic_shapes=axes)
    made = substitute(traced, sites, plan_by_rules(sites, {"*": "hedgehog"}))
    x, mask = torch.randn(2, 11, 16), torch.ones(2, 11, dtype=torch.bool)
    assert made.module(x=x, mask=mask).shape == (2, 11, 16)
    for s in sites:
        revert(made, s.id)
    torch.testing.assert_close(made.module(x=x, mask=mask), model(x, mask))


def test_ids_that_look_alike_get_their_own_modules() -> None:
    model, inputs = encoder()
    traced, sites = canonical(model, inputs, PADDED)
    nodes = [n for n in traced.module.graph.nodes if n.target is SDPA]
    renamed = []
    for node, s, name in zip(nodes, sites, ["a.b#0", "a_b#0"], strict=True):
        new = AttentionSite(name, s.node, s.dims, s.dtype, s.scale, s.mask)
        node.meta["attention_site"] = new
        renamed.append(new)
    made = substitute(traced, renamed, Plan({}))
    assert made.attention("a.b#0") is not made.attention("a_b#0")
    torch.testing.assert_close(made.module(**inputs), model(**inputs))
