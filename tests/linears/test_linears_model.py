"""Linear layers of whole models: found, planned, replaced, trained, sealed, compiled, saved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes.errors import FormError, NothingRewritten, UnmatchedRule, UsageError
from passes.linear_forms.shift import Shift
from passes.linear_layers import find_linears
from passes.linears import capture_inputs, linear_modules
from passes.plan import Plan
from passes.site import SiteStatus
from rewriter.api import find_sites
from rewriter.folder import load_rewritten, save_rewritten
from rewriter.linear_train import recover
from rewriter.linear_work import linear_rules


class Small(nn.Module):
    """Attention and an MLP; `turn` holds its weight as [K, N], `tied` is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, 32), nn.Linear(32, 5)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.up, self.tied = nn.Linear(32, 64), nn.Linear(32, 32)
        self.turn = nn.Parameter(torch.randn(64, 32) / 8)
        self.turn_bias = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, t, d = x.shape
        q, k, v = (m(x).view(b, t, 4, 8).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        x = self.tied(self.tied(x + y))
        y = nn.functional.gelu(self.up(x)).reshape(-1, 64)
        x = x + torch.addmm(self.turn_bias, y, self.turn).view(b, t, d)
        return self.head(x)


@pytest.fixture
def model() -> Small:
    return Small().eval()


def test_layers_are_found_with_their_kin(model: Small) -> None:
    traced, _ = find_sites(model, (torch.randn(2, 3, 12),))
    layers = {layer.id: layer for layer in find_linears(traced.module)}
    assert [*layers][:: len(layers) - 1] == ["embed", "head"]
    turned = next(layer for layer in layers.values() if layer.transposed)
    assert (turned.inputs, turned.outputs, turned.bias) == (64, 32, "turn_bias")
    assert (layers["up"].inputs, layers["up"].outputs) == (32, 64)
    assert [i for i, layer in layers.items() if layer.shared] == ["tied", "tied#1"]


def test_a_rule_for_all_keeps_the_ends_and_refuses_shared_weights(model: Small) -> None:
    x = torch.randn(2, 3, 12)
    before = copy.deepcopy(model.state_dict())
    result = rewriter.rewrite(model, (x,), linear="shift")
    status = {i: c.status for i, c in result.plan.linears.items()}
    assert status["embed"] == status["head"] == SiteStatus.KEPT
    assert status["tied"] == SiteStatus.REFUSED
    assert set(linear_modules(result.model)) == {"q", "k", "v", "up", "turn"}
    assert "S01: its weight is also used by" in result.plan.linears["tied"].why
    assert any("5 shift" in note for note in result.report.notes)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert "q.weight" not in dict(result.model.named_parameters())
    gap = (result.model(x) - model(x)).norm() / model(x).norm()
    assert 1e-4 < gap < 0.5


def test_the_modules_compute_what_their_weights_say(model: Small) -> None:
    x = torch.randn(2, 3, 12)
    result = rewriter.rewrite(model, (x,), linear="shift:bits=5:terms=2,*")
    rounded = copy.deepcopy(model)
    for name, made in linear_modules(result.model).items():
        weight = made.form.weight(made.params).detach()
        if name == "turn":
            rounded.turn.data = weight.T.contiguous()
        else:
            rounded.get_submodule(name).weight.data = weight
    torch.testing.assert_close(result.model(x), rounded(x))
    with torch.no_grad():  # the kept weight follows the parameters
        before = result.model(x)
        for made in linear_modules(result.model).values():
            made.params["weight"].mul_(-1.0)
        assert not torch.allclose(result.model(x), before)


@pytest.mark.parametrize("tokens", [1, 6])
def test_compiled_equals_rewritten(model: Small, tokens: int, tmp_path: Path) -> None:
    x = torch.randn(1, tokens, 12)
    path = tmp_path / "m.rwa"
    result = rewriter.rewrite(model, (x,), form="elu", linear={"q": "shift", "up": Shift()})
    artifact = rewriter.compile(result, path=path)
    (out,) = artifact(x.numpy()).values()
    torch.testing.assert_close(torch.as_tensor(out), result.model(x), rtol=1e-4, atol=1e-5)
    rules = {k.scheduled_by for k in result.report.kernels if k.name.startswith("coded")}
    assert rules <= {"coded_rows", "tiny"}
    assert rules
    assert set(Plan.from_json(artifact.manifest.plan).linears) == {"q", "up"}


def test_a_saved_plan_and_folder_bring_it_back(model: Small, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 12)
    result = rewriter.rewrite(model, (x,), linear="shift:train=ps")
    with torch.no_grad():
        linear_modules(result.model)["up"].params["shift"].sub_(1.0)
    save_rewritten(result, tmp_path / "folder")
    loaded = load_rewritten(model, (x,), tmp_path / "folder")
    torch.testing.assert_close(loaded.model(x), result.model(x))
    assert loaded.plan.linears == result.plan.linears


def test_training_towards_the_original_recovers(model: Small) -> None:
    data = [{"x": torch.randn(8, 3, 12)} for _ in range(12)]
    result = rewriter.rewrite(model, (torch.randn(8, 3, 12),), linear="shift:bits=3")
    recover(result, data, seconds=600.0, steps=150)
    note = next(n for n in result.report.notes if "towards the original" in n)
    before, after = (float(part) for part in note.split("error ")[1].split(" in ")[0].split(" -> "))
    assert after < 0.7 * before


def test_captured_inputs_are_those_of_the_layer(model: Small) -> None:
    traced, _ = find_sites(model, (torch.randn(2, 3, 12),))
    batches = [{"x": torch.randn(2, 3, 12)} for _ in range(2)]
    found = capture_inputs(traced.module, ["embed", "up"], batches)
    assert torch.equal(found["embed"], torch.cat([b["x"].reshape(-1, 12) for b in batches]))
    assert found["up"].shape == (12, 32)
    few = capture_inputs(traced.module, ["up"], batches, most=4)
    assert few["up"].shape == (4, 32)


def test_wrong_requests_say_what_is_wrong(model: Small) -> None:
    x = (torch.randn(1, 2, 12),)
    with pytest.raises(UnmatchedRule, match="decoder"):
        rewriter.rewrite(model, x, linear="shift,decoder.*")
    with pytest.raises(NothingRewritten, match="tied"):
        rewriter.rewrite(model, x, linear="shift,tied*")
    for wrong in ("shift,", "shift:bits", "shift:bits=9", "shoft", 7, []):
        with pytest.raises(UsageError):
            linear_rules(wrong)
    broken = copy.deepcopy(model)
    broken.up.weight.data[0, 0] = float("nan")
    with pytest.raises(FormError, match=r"up.*not finite"):
        rewriter.rewrite(broken, x, linear="shift")
    assert list(linear_rules(["shift,a", "shift:bits=3"])) == ["a", "*"]
