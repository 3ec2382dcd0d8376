import copy

import pytest
import torch
from torch import nn

from passes.errors import InputError, TraceError
from passes.find import find
from passes.trace import trace
from tests.factories import Attention, Block, Branches, FixedLength


class ExportCannot(nn.Module):
    """A python-side effect on type: export's fake tensors are refused, symbolic proxies are not."""

    def forward(self, x):
        if isinstance(x, torch.Tensor) and type(x) is not torch.Tensor:
            raise RuntimeError("only plain tensors")
        return nn.functional.softmax(x, dim=-1)


def ids(batch=2, seq=8):
    return torch.randint(0, 50, (batch, seq))


def test_module_keeps_names_and_values():
    model = Block().eval()
    x = ids()
    traced = trace(model, {"input_ids": x})
    assert traced.tracer == "export"
    assert list(traced.example_kwargs) == ["input_ids"]
    torch.testing.assert_close(traced.module(input_ids=x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(traced.module(x), model(x), rtol=0, atol=0)


def test_positional_inputs_can_be_given_by_name():
    model, x = Attention(), torch.randn(2, 8, 16)
    traced = trace(model, (x,))
    torch.testing.assert_close(traced.module(x=x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(traced.module(x), traced.module(*traced.example_args))


def test_site_paths_are_the_models_own():
    traced = trace(Block(), {"input_ids": ids()})
    node = next(n for n in traced.module.graph.nodes if "scaled_dot" in str(n.target))
    assert [path for path, _ in node.meta["nn_module_stack"].values()][-1] == "attention"
    assert not [n for n in traced.module.graph.nodes if "guard" in n.name]


def test_traced_module_trains():
    model = Block().train()
    traced = trace(model, {"input_ids": ids()})
    assert traced.module.training
    assert model.training
    assert not torch.equal(traced.module(ids()), traced.module(ids()))
    traced.module.train()
    traced.module(ids()).square().sum().backward()
    assert all(p.grad is not None for p in traced.module.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_model_is_kept(training):
    model = Block().train(training)
    traced = trace(model, {"input_ids": ids()})
    assert {m.training for m in model.modules()} == {training}
    assert traced.module.training is training
    copy.deepcopy(traced.module)(ids())


def test_dynamic_short_form_takes_torchs_bound_with_a_note():
    model = Block(length=32).eval()
    traced = trace(
        model, {"input_ids": ids(2, 8)}, dynamic_shapes={"input_ids": {0: "batch", 1: "seq"}}
    )
    assert traced.dynamic == {"input_ids": {0: "batch", 1: "seq"}}
    assert "'seq' is limited to max 32" in " ".join(traced.notes)
    for batch, seq in ((1, 1), (3, 32), (2, 7)):
        x = ids(batch, seq)
        torch.testing.assert_close(traced.module(x), model(x))
    with pytest.raises(InputError, match=r"'input_ids': axis 1 has size 33, traced for 1 to 32"):
        traced.module(ids(2, 33))


def test_dynamic_example_of_size_one_stays_dynamic():
    model, x = Attention(), torch.randn(1, 8, 16)
    traced = trace(model, {"x": x}, dynamic_shapes={"x": {0: "batch"}})
    assert traced.example_kwargs["x"].shape == (1, 8, 16)
    y = torch.randn(5, 8, 16)
    torch.testing.assert_close(traced.module(y), model(y))
    torch.testing.assert_close(traced.module(x), model(x))


def test_dynamic_auto_shares_names_between_inputs():
    model = Block().eval()
    given = {"input_ids": ids(2, 8), "scale": torch.randn(2)}
    traced = trace(model, given, dynamic_shapes="auto")
    assert traced.dynamic == {"input_ids": {0: "batch", 1: "seq"}, "scale": {0: "batch"}}


def test_dynamic_auto_specialises_what_can_not_be_dynamic():
    traced = trace(FixedLength(), {"x": torch.randn(2, 8, 16)}, dynamic_shapes="auto")
    assert traced.dynamic == {"x": {0: "batch"}}


def test_dynamic_asked_but_impossible_is_an_error_with_torchs_suggestion():
    with pytest.raises(TraceError, match=r"torch suggests: seq = 8") as caught:
        trace(FixedLength(), {"x": torch.randn(2, 8, 16)}, dynamic_shapes={"x": {1: "seq"}})
    assert "TORCH_LOGS" not in str(caught.value)


def test_torchs_own_form_of_dynamic_shapes():
    spec = {"x": {0: torch.export.Dim("n", max=9)}}
    traced = trace(Attention(), (torch.randn(2, 8, 16),), dynamic_shapes=spec)
    assert traced.dynamic == {"x": {0: "n"}}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"y": {0: "batch"}}, "'y' is not an example input"),
        ({"x": {5: "batch"}}, "'x' has 3 axes"),
        ("automatic", "the word is 'auto'"),
    ],
)
def test_wrong_dynamic_shapes(spec, said):
    with pytest.raises(InputError, match=said):
        trace(Attention(), {"x": torch.randn(2, 8, 16)}, dynamic_shapes=spec)


def test_data_dependent_control_flow_names_the_line(capfd):
    with pytest.raises(TraceError) as caught:
        trace(Branches(), {"x": torch.randn(2, 4)})
    message = str(caught.value)
    assert "factories.py:" in message
    assert "if x.sum() > 0" in message
    assert "torch.cond" in message
    assert "torch suggests: consider using data-dependent friendly APIs" in message
    assert "symbolic_trace failed too" in message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 6
    assert capfd.readouterr().err == ""


def test_symbolic_trace_where_export_can_not():
    traced = trace(ExportCannot(), {"x": torch.randn(2, 4)})
    assert traced.tracer == "symbolic_trace"
    assert "only plain tensors" in traced.notes[0]
    x = torch.randn(2, 4)
    torch.testing.assert_close(traced.module(x=x), x.softmax(-1))


class KeptWhole(ExportCannot):
    """Only symbolic_trace takes it, and that keeps nn.MultiheadAttention as one call."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attn(super().forward(x), x, x, need_weights=False)[0]


def test_attention_that_symbolic_trace_hides_is_a_near_miss():
    found = find(trace(KeptWhole(), {"x": torch.randn(2, 4, 16)}))
    assert found.sites == ()
    hidden = [m for m in found.near_misses if "keeps MultiheadAttention whole" in m.reason]
    assert [m.module_path for m in hidden] == ["attn"]


def test_fast_path_of_multihead_attention_is_off_only_while_tracing():
    before = torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    traced = trace(layer, (torch.randn(2, 8, 16),))
    names = " ".join(str(n.target) for n in traced.module.graph.nodes)
    assert "_transformer_encoder_layer_fwd" not in names
    assert "scaled_dot_product_attention" in names
    assert torch.backends.mha.get_fastpath_enabled() is before


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "empty; give one tensor for each argument of forward: input_ids, scale"),
        ((), "empty"),
        ({"input_idz": ids()}, "'input_idz': .*did you mean input_ids"),
        ({"zzz": ids()}, "'zzz': .*it takes input_ids, scale"),
        ({"scale": torch.ones(2)}, "missing a required argument: 'input_ids'"),
        ({"input_ids": [1, 2]}, "'input_ids': expected a tensor, got list"),
        ({"input_ids": ids(), "scale": torch.tensor([1.0, float("nan")])}, "'scale': contains NaN"),
        ((ids(), torch.tensor([1.0, float("nan")])), "'scale': contains NaN"),
        ({"input_ids": ids(0)}, "'input_ids': empty tensor"),
        ({"input_ids": torch.randn(2, 8)}, "does not run on its example inputs"),
        ("text", "expected a tuple or dict"),
    ],
)
def test_bad_example_inputs_name_the_argument(inputs, said):
    with pytest.raises(InputError, match=said):
        trace(Block(), inputs)


def test_not_a_module():
    with pytest.raises(InputError, match="expected a torch module, got function"):
        trace(lambda x: x, (torch.ones(1),))


def test_exported_program_and_graph_module(tmp_path):
    model, x = Block().eval(), ids()
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2")
    traced = trace(program, ())
    torch.testing.assert_close(traced.module(*traced.example_args), model(x))
    assert traced.module.training is False
    again = trace(traced.module, {"input_ids": x})
    torch.testing.assert_close(again.module(input_ids=x), model(x))


def test_wrong_shape_at_a_call_is_an_input_error():
    traced = trace(Attention(), {"x": torch.randn(2, 8, 16)})
    with pytest.raises(InputError, match="'x': axis 1 has size 9, traced for 8"):
        traced.module(x=torch.randn(2, 9, 16))
    with pytest.raises(InputError, match="'x': traced with 3 axes"):
        traced.module(torch.randn(8, 16))
