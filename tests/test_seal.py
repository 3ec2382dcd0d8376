"""Sealed programs: one custom op per site, the same function, ties and module paths kept."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from passes.errors import LoweringError
from passes.form import FormSpec, form_named
from passes.plan import plan_by_rules
from passes.seal import NAMESPACE, NOTES, is_form_op, op_name, op_of_form, read_spec, seal
from passes.site import Mask
from passes.substitute import Rewritten, substitute
from rewriter.api import find_sites, make_plan
from tests.by_hand import Attention, Encoder, canonical, site

FORMS = ["exact", "elu", "hedgehog"]


def encoder(
    form: str, *, train: bool = False, dynamic: Any = None, **options: Any
) -> tuple[Rewritten, dict[str, Tensor]]:
    x, mask = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    inputs = {"x": x, "mask": mask}
    model = Encoder(**options).train(train)
    traced, sites = canonical(model, inputs, Mask(padding=True), dynamic_shapes=dynamic)
    made = substitute(traced, sites, plan_by_rules(sites, {"*": form}))
    with torch.no_grad():
        for name, p in made.module.named_parameters():
            if ".params." in name:
                p += 0.2 * torch.randn_like(p)
    return made, inputs


def ops(program: ExportedProgram) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if is_form_op(n.target)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [4, 1])
def test_the_sealed_program_equals_the_module(form: str, groups: int) -> None:
    made, inputs = encoder(form, groups=groups)
    program = seal(made)
    torch.testing.assert_close(
        program.module()(**inputs), made.module(**inputs), rtol=1e-6, atol=1e-6
    )
    again = {"x": torch.randn(2, 7, 16), "mask": inputs["mask"].flip(0)}
    torch.testing.assert_close(
        program.module()(**again), made.module(**again), rtol=1e-6, atol=1e-6
    )
    assert [n.target for n in ops(program)] == [op_of_form(form)] * 2


@pytest.mark.parametrize("form", FORMS)
def test_arguments_of_the_op(form: str) -> None:
    made, _ = encoder(form)
    program = seal(made)
    tensors = {**program.state_dict}
    names = program.graph_signature.inputs_to_parameters
    for node, at in zip(ops(program), made.sites, strict=True):
        q, _, _, key_mask, bias, params, spec = node.args
        module = made.attention(at.id)
        assert bias is None
        assert key_mask.meta["val"].shape == (2, 7)
        assert key_mask.meta["val"].dtype == torch.bool
        assert q.meta["val"].shape == node.meta["val"].shape == (2, 4, 7, 4)
        assert FormSpec.loads(spec) == module.spec
        assert read_spec(spec)[0].name == form
        order = module.form.param_names()
        assert len(params) == len(order)
        for p, name in zip(params, order, strict=True):
            assert torch.equal(tensors[names[p.name]], module.params[name])


@pytest.mark.parametrize("decomposed", [False, True])
def test_sites_and_module_paths_survive(decomposed: bool) -> None:
    made, _ = encoder("hedgehog")
    program = seal(made)
    assert [n.meta["attention_site"] for n in ops(program)] == [s.id for s in made.sites]
    program = program.run_decompositions() if decomposed else program
    for node, at in zip(ops(program), made.sites, strict=True):
        assert node.meta["custom"]["attention_site"] == at.id
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert node.meta["nn_module_stack"], node.name
    norms = [n for n in program.graph.nodes if "layer_norm" in str(n.target)]
    paths = [list(n.meta["nn_module_stack"].values())[-1][0] for n in norms]
    assert paths == ["layers.0.norm", "layers.1.norm"]


def test_tied_weights_are_one_input_and_nothing_is_copied() -> None:
    made, _ = encoder("hedgehog")
    program = seal(made)
    q = [n for n in program.graph_signature.parameters if n.endswith("attention.q.weight")]
    assert len(q) == 1
    own = {p.data_ptr() for p in made.module.parameters()}
    assert {program.state_dict[n].data_ptr() for n in program.graph_signature.parameters} <= own


def test_the_rewritten_model_is_not_changed() -> None:
    made, inputs = encoder("hedgehog")
    made.module.train()
    before, code = made.module(**inputs), made.module.code
    seal(made)
    assert made.module.training
    assert made.module.code == code
    assert made.attention(made.sites[0].id).training
    torch.testing.assert_close(made.module(**inputs), before, rtol=0, atol=0)
    seal(made)  # and again, with ops that are registered already


def test_input_names_and_order_are_kept() -> None:
    program = seal(encoder("elu")[0])
    assert program.graph_signature.user_inputs == ("x", "mask")


def test_dynamic_dimensions_are_fixed_with_a_note() -> None:
    axes = {"x": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}}
    made, inputs = encoder("hedgehog", dynamic=axes)
    program = seal(made)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert all(isinstance(n, int) for n in value.shape)
    torch.testing.assert_close(
        program.module()(**inputs), made.module(**inputs), rtol=1e-6, atol=1e-6
    )
    notes = program.graph_module.meta[NOTES]
    assert "dynamic dimension 'batch' is fixed at 2" in notes
    assert "dynamic dimension 'seq' is fixed at 7" in notes


def test_dropout_recorded_in_training_is_left_out_with_a_note() -> None:
    made, inputs = encoder("exact", train=True)
    program = seal(made)
    assert not [n for n in program.graph.nodes if "dropout" in str(n.target)]
    first, second = (program.module()(**inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert any("2 dropouts" in n for n in program.graph_module.meta[NOTES])
    assert not seal(encoder("exact")[0]).graph_module.meta[NOTES]


@pytest.mark.parametrize("form", FORMS)
def test_causal_cross_and_bfloat16(form: str) -> None:
    model = Attention(causal=True).eval().to(torch.bfloat16)
    x = torch.randn(2, 70, 16).to(torch.bfloat16)
    traced, sites = canonical(model, (x,), Mask(causal=True))
    made = substitute(traced, sites, plan_by_rules(sites, {"*": form}))
    out = seal(made).module()(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, made.module(x), rtol=0, atol=0)
    cross = Attention().eval()
    x, memory = torch.randn(2, 3, 16), torch.randn(2, 9, 16)
    traced, sites = canonical(cross, {"x": x, "memory": memory})
    made = substitute(traced, sites, plan_by_rules(sites, {"*": form}))
    out = seal(made).module()(x=x, memory=memory)
    torch.testing.assert_close(out, made.module(x=x, memory=memory), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_op_holds_torchs_rules_for_custom_ops(form: str) -> None:
    at = site(T=5, S=5, G=2, padding=True)
    maker = form_named(form)
    q = torch.randn(2, 4, 5, 8).transpose(1, 2).contiguous().transpose(1, 2)  # not contiguous
    k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    params = [p for _, p in sorted(maker.init_params(at).items())]
    key_mask = torch.rand(2, 5) > 0.3
    arguments = (q, k, v, key_mask, None, params, maker.spec(at).dumps())
    checks = ("test_schema", "test_faketensor")
    result = torch.library.opcheck(op_of_form(form), arguments, test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}
    named = dict(zip(maker.param_names(), params, strict=True))
    want = maker.attend(maker.spec(at), named, q, k, v, key_mask)
    torch.testing.assert_close(op_of_form(form)(*arguments), want, rtol=0, atol=0)


def test_names_of_ops() -> None:
    assert op_name("hedgehog") == "attnform_hedgehog"
    assert op_name("shift-add v2") == "attnform_shift_add_v2"
    assert op_of_form("elu") is op_of_form("elu")
    assert is_form_op(op_of_form("elu"))
    assert not is_form_op(torch.ops.aten.add.Tensor)
    assert op_of_form("elu")._schema.name == f"{NAMESPACE}::attnform_elu"


def test_a_model_that_can_not_be_exported_is_a_clear_error() -> None:
    made, _ = encoder("exact")

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        value = args[0].sum().item()
        return args[0] if value > 0 else -args[0]

    made.attention(made.sites[0].id).form.attend = forward  # type: ignore[method-assign]
    seal(made)  # the op hides what a form does
    node = next(n for n in made.module.graph.nodes if "linear" in str(n.target))
    node.target = branch
    made.module.recompile()
    with pytest.raises(LoweringError, match="can not be exported") as caught:
        seal(made)
    assert not re.search("\n", str(caught.value))


def branch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer that looks at its data."""
    return x @ weight.T + bias if x.sum() > 0 else x


class _Viewed(nn.Module):
    """Attention by hand whose output is viewed after a `contiguous` that a trace leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(40, 120), nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 5, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).contiguous().view(batch, tokens, width))


@pytest.mark.parametrize("form", ["exact", "elu", "hedgehog"])
def test_a_view_of_the_output_takes_any_strides(form: str) -> None:
    model, x = _Viewed().eval(), torch.randn(2, 33, 40)
    traced, found = find_sites(model, (x,))
    made = substitute(traced, found.sites, make_plan(found, form=form))
    got = made.module(x)  # as fit runs it
    sealed = seal(made).module()(x)
    torch.testing.assert_close(sealed, got, rtol=1e-5, atol=1e-5)
    if form == "exact":
        torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)


class _ByHand(_Viewed):
    """The same with its softmax written out and a padding mask."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 5, 8).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * 8**-0.5
        scores = scores.masked_fill(~keep[:, None, None, :], -1e9)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("shapes", [None, "auto"])
def test_nothing_touches_the_users_random_state(by_hand: bool, shapes: Any) -> None:
    model = _ByHand().eval() if by_hand else _Viewed().eval()
    inputs: tuple[Tensor, ...] = (torch.randn(2, 33, 40),)
    if by_hand:
        inputs = (*inputs, torch.arange(33)[None] < torch.tensor([[33], [20]]))
    before = torch.random.get_rng_state()
    traced, found = find_sites(model, inputs, dynamic_shapes=shapes)
    assert len(found.sites) == 1
    made = substitute(traced, found.sites, make_plan(found, form="hedgehog"))
    made.put(found.sites[0].id, form_named("elu"))
    seal(made)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_user_sees_no_warnings_of_torch_about_itself() -> None:
    from codegen.frontend import to_relax
    from codegen.target import target_named

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        traced, found = find_sites(_Viewed().eval(), (torch.randn(2, 33, 40),))
        made = substitute(traced, found.sites, make_plan(found, form="hedgehog"))
        to_relax(seal(made), target_named("cpu"))
