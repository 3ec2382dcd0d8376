"""The import: indices, outputs, inputs, refusals, constants."""

import numpy as np
import pytest
import torch
from torch import nn

from codegen.frontend import to_relax
from codegen.lower import lower
from codegen.schedule import Outcome, rules, workload_key
from codegen.specs import TensorSpec
from codegen.target import target_named
from passes.errors import LoweringError
from tests.targets.lowering import check, lowered, run
from tests.targets.test_lower_rows import Apply


def test_indices_never_leave_the_table():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 8)

        def forward(self, ids):
            return self.table(ids[:, :3].reshape(-1))

    model, good = Model(), torch.tensor([[1, 2, 9, 0]])
    result = lowered(model, (good,))
    assert (result.inputs[0].low, result.inputs[0].high) == (0, 9)
    bad = torch.tensor([[-5, 2**40, 10, 0]])
    (got,) = run(result, (bad,))
    np.testing.assert_array_equal(got, model.table.weight.detach().numpy()[[0, 9, 9]])


def test_advanced_index_gather_and_select():
    def fn(x, i):
        return x[i], torch.gather(x, 1, i[:, None]), x.select(-1, -1), x.index_select(1, i), x[i, i]

    check(Apply(fn), torch.randn(6, 6), torch.tensor([1, 0, 5, 2, 3, 4]))


def test_an_index_on_another_axis_is_a_slice_of_it():
    def fn(x, i):
        return x[..., [-2], :], x[:, :, i], x[:, [[0, -1], [1, 1]]]

    check(Apply(fn), torch.randn(3, 5, 6), torch.tensor([1, 0, 5, -2]))


def test_empty_parts_add_nothing_to_others():
    def fn(x):
        rotated, passed = x[..., :6] * 2, x[..., 6:]
        return torch.cat([rotated, passed], -1) + 1, torch.cat([passed, x, x[..., :0]], dim=2)

    check(Apply(fn), torch.randn(2, 3, 6))


def test_none_inputs_and_none_outputs_are_dropped():
    class Model(nn.Module):
        def forward(self, x, mask=None, *, flag=True):
            return {"y": x * 2 if mask is None else x, "nothing": None, "z": x + 1}

    result = lowered(Model(), (torch.randn(3), None))
    assert [i.name for i in result.inputs] == ["x"]
    assert [o.name for o in result.outputs] == ["y", "z"]


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (lambda x: x + 1, ["output"]),
        (lambda x: (x + 1, x + 2), ["output_0", "output_1"]),
        (lambda x: {"a": x + 1, "b": (x, x * 2)}, ["a", "b.0", "b.1"]),
    ],
)
def test_output_names(fn, names):
    x = torch.randn(4, 3)
    result = check(Apply(fn), x)
    assert [o.name for o in result.outputs] == names


def test_all_unsupported_operators_are_named_at_once():
    class Model(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x) + torch.special.bessel_y0(x)

    exported = torch.export.export(Model(), (torch.rand(4),))
    with pytest.raises(LoweringError) as caught:
        to_relax(exported, target_named("cpu"))
    for word in ("bessel_j0", "bessel_y0", "test_lower_frontend.py"):
        assert word in str(caught.value)


def test_dynamic_dimensions_are_refused():
    dim = torch.export.Dim("n", min=2, max=64)
    exported = torch.export.export(
        nn.Linear(4, 4), (torch.randn(3, 4),), dynamic_shapes={"input": {0: dim}}
    )
    with pytest.raises(LoweringError, match="dynamic"):
        to_relax(exported, target_named("cpu"))


def test_what_does_not_depend_on_inputs_is_computed_before():
    def fn(x):
        mask = torch.arange(40)[:, None] >= torch.arange(40)[None]
        return torch.where(mask, x, torch.zeros(()))

    result = check(Apply(fn), torch.randn(40, 40))
    assert len(result.kernels) == 1
    assert [w.dtype for w in result.weights.values()] == [np.dtype(bool)]


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0), (3, 0)])
def test_convolutions(groups, stride, padding):
    model = nn.Sequential(
        nn.Conv2d(8, 24, 3, stride=stride, padding=padding, groups=groups), nn.GELU()
    )
    result = check(model, torch.randn(2, 8, 13, 17))
    assert {"conv", "dense"} & {k.scheduled_by for k in result.kernels}


def test_convolution_of_sequences():
    model = nn.Conv1d(6, 20, 3, stride=2, padding=1, dilation=1)
    result = check(model, torch.randn(2, 6, 35))
    assert "conv" in {k.scheduled_by for k in result.kernels}


def test_a_crashing_rule_is_recorded_and_the_next_one_asked():
    x = torch.randn(4, 40)
    imported = to_relax(torch.export.export(Apply(lambda a: a + 1), (x,)), target_named("cpu"))

    def broken(func, target):
        raise RuntimeError("broken record")

    result = lower(imported, target_named("cpu"), tuned=broken)
    assert all(k.scheduled_by in {r.name for r in rules()} for k in result.kernels)
    assert np.allclose(run(result, (x,))[0], x.numpy() + 1)


def test_nobody_takes_a_kernel(monkeypatch):
    imported = to_relax(
        torch.export.export(Apply(lambda a: a + 1), (torch.randn(4),)), target_named("cpu")
    )
    monkeypatch.setattr("codegen.lower.schedule", lambda f, t, tuned: Outcome(f, ""))
    with pytest.raises(LoweringError, match="add"):
        lower(imported, target_named("cpu"))
    left = lower(imported, target_named("cpu"), allow_unscheduled=True)
    assert [k.scheduled_by for k in left.kernels] == [""]


def test_workload_keys_tell_kernels_apart():
    def keys(width):
        result = lowered(Apply(lambda a: torch.softmax(a, -1)), (torch.randn(4, width),))
        funcs = [f for g, f in result.unscheduled.functions_items() if g.name_hint == "softmax"]
        return [workload_key(f) for f in funcs]

    assert keys(48) == keys(48) != keys(64)


def test_specs_round_trip():
    spec = TensorSpec("ids", (2, 3), "int64", 0, 9)
    assert TensorSpec.from_json(spec.to_json()) == spec
    assert spec.nbytes == 48
