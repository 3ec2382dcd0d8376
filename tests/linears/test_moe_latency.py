"""Latencies of experts: measured by the compiled kernel, or counted; kept in the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rewriter
from codegen import dispatch_time
from codegen.dispatch_time import by_turns, expert_seconds, why_not_timed
from codegen.target import target_named
from passes.linear_form import LinearSpec
from passes.linear_forms._codes import CodeSpec
from passes.linear_forms.moe import Moe
from passes.linears import linear_modules
from passes.plan import Plan
from rewriter.folder import load_rewritten, save_rewritten
from rewriter.linear_work import convert_linears

Run = Callable[[], None]


class Net(nn.Module):
    """Two layers of one shape, one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.a(x)[:, None]
        y = nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]
        y = self.c(torch.relu(self.b(y)))
        return self.head(self.down(torch.relu(self.up(y))))


class Clock:
    """A timer that says what it is told, after it ran both functions."""

    def __init__(self, *seconds: tuple[float, float]) -> None:
        self.seconds, self.calls = list(seconds), 0

    def __call__(self, multiply: Run, shift: Run) -> tuple[float, float]:
        multiply()
        shift()
        self.calls += 1
        return self.seconds[(self.calls - 1) % len(self.seconds)]


def test_each_shape_is_measured_once_and_the_plan_keeps_it(tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(2, 5, 16)
    result = rewriter.rewrite(model, (x,), form="exact", on_noop="ok")
    clock = Clock((3e-6, 1e-6), (8e-6, 2e-6), (5e-6, 5e-6))
    convert_linears(result, "moe", timer=clock)
    assert clock.calls == 3  # b and c, up, down
    config = {i: c.config for i, c in result.plan.linears.items() if c.form == "moe"}
    assert config["b"]["latencies"] == config["c"]["latencies"] == [3.0, 1.0]
    assert config["up"]["latencies"] == [8.0, 2.0]
    assert config["up"]["source"] == "measured on cpu"
    modules = linear_modules(result.model)
    assert modules["down"].form.times(modules["down"].spec) == (5.0, 5.0)
    told = [note for note in result.report.notes if note.startswith("moe, ")]
    assert len(told) == 3
    assert "2 layers 16 -> 16 on 10 tokens: multiply 3, shift 1 µs" in told[0]
    assert "balanced with 25% of the tokens at multiply" in told[0]
    save_rewritten(result, tmp_path / "saved")  # and nothing is measured again
    again = load_rewritten(model, (x,), tmp_path / "saved")
    assert again.plan.linears == result.plan.linears


def test_given_latencies_are_taken_as_they_are() -> None:
    result = rewriter.rewrite(Net().eval(), (torch.randn(2, 5, 16),), linear="moe:latencies=6/4")
    found = {m.form.times(m.spec) for m in linear_modules(result.model).values()}
    assert found == {(6.0, 4.0)}
    (note, *_) = [note for note in result.report.notes if note.startswith("moe, ")]
    assert "multiply 6, shift 4 parts (given); balanced with 40% of the tokens at multiply" in note
    assert result.report.experts["times"][0]["layers"] == ["b", "c"]


def test_a_target_that_does_not_run_here_is_counted_with_a_note() -> None:
    result = rewriter.rewrite(
        Net().eval(), (torch.randn(2, 5, 16),), linear="moe", target="edge:cortex-a72"
    )
    (note, *_) = [note for note in result.report.notes if note.startswith("moe, ")]
    assert "operations (counted, not measured on edge:cortex-a72: it holds aarch64" in note
    config = result.plan.linears["b"].config
    spec = LinearSpec("moe", 16, 16, True)
    assert config["latencies"] == list(Moe().times(spec, 10))
    assert Plan.from_json(result.plan.to_json()).linears["b"].config == config
    assert "no kernel" in why_not_timed(target_named("cuda:sm_90"))


@pytest.mark.parametrize("rows", [1, 40])
def test_the_clock_runs_each_expert_on_all_tokens(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch_time, "SECONDS", 0.01)
    first, second = expert_seconds(target_named("cpu"), CodeSpec(4), (rows, 24, 40))
    assert 1e-7 < first < 1
    assert 1e-7 < second < 1


@pytest.mark.parametrize("expert", [0, 1])
def test_a_run_sends_all_tokens_to_one_expert(expert: int) -> None:
    seen: list[np.ndarray] = []
    arrays = {"x": np.random.rand(9, 8).astype(np.float32), "router": np.ones((2, 8), np.float32)}
    run = dispatch_time._sent(
        lambda *args: seen.extend(a.numpy() for a in args), arrays, np.empty((9, 4)), expert
    )
    run()
    x, router, _ = seen
    assert ((x @ router.T).argmax(-1) == expert).all()
    assert (arrays["router"] == 1).all()


def test_turns_find_the_slower_one() -> None:
    work = torch.randn(200, 200)

    def long() -> None:
        for _ in range(5):
            work @ work

    first, second = by_turns(long, lambda: None)
    assert first > 5 * second
