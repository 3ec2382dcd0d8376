from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rewriter.fit_loop import MOST_SKIPS, Loop, Task, shuffled
from rewriter.fit_state import FitState


def task(
    param: nn.Parameter, loss: Callable[[int], Tensor], steps: int = 200, rate: float = 0.05
) -> Task:
    def value() -> float:
        return float((param.detach() - 3).square().sum())

    params = {"x": param}
    return Task("t", "sites", "s", params, {"x": rate}, lambda n, _: loss(n), value, 600.0, steps)


def test_it_minimises_and_reports_losses() -> None:
    x = nn.Parameter(torch.zeros(4))
    stage = Loop(task(x, lambda _: (x - 3).square().sum()), FitState(), lambda: None, 1e9).run()
    assert stage.loss_before == 36.0
    assert stage.loss_after < 0.1
    assert stage.steps == 200
    assert float((x.detach() - 3).square().sum()) == stage.loss_after


def test_a_loss_that_is_not_finite_is_skipped_at_a_lower_rate_from_the_best_state() -> None:
    x, state = nn.Parameter(torch.zeros(4)), FitState()

    def loss(step: int) -> Tensor:
        made = (x - 3).square().sum()
        return made * math.nan if step in (3, 50) else made

    stage = Loop(task(x, loss), state, lambda: None, 1e9).run()
    assert stage.skipped == 2
    assert state.lr_factor == 0.25
    assert torch.isfinite(x).all()
    assert stage.loss_after < stage.loss_before


def test_a_gradient_that_is_not_finite_never_reaches_the_parameters() -> None:
    x = nn.Parameter(torch.zeros(4))
    stage = Loop(task(x, lambda _: (x * 0).sqrt().sum()), FitState(), lambda: None, 1e9).run()
    assert stage.skipped == MOST_SKIPS
    assert torch.equal(x.detach(), torch.zeros(4))


def test_the_best_state_is_kept_when_later_ones_are_worse() -> None:
    x = nn.Parameter(torch.full((4,), 2.9))
    stage = Loop(task(x, lambda _: -x.sum(), rate=0.5), FitState(), lambda: None, 1e9).run()
    assert stage.loss_after <= stage.loss_before
    assert float((x.detach() - 3).square().sum()) == stage.loss_after
    assert stage.steps == 180  # nothing better in five looks, and 90 % of the task are done


def test_progress_and_saving() -> None:
    x, told, saves = nn.Parameter(torch.zeros(2)), [], []
    made = task(x, lambda _: x.square().sum(), steps=5)
    Loop(made, FitState(), lambda: saves.append(1), 0.0, lambda *a: told.append(a)).run()
    assert [t[:4] for t in told] == [("sites", "s", n, 5) for n in range(1, 6)]
    assert len(saves) == 5


def test_every_round_uses_every_item_once_in_a_seeded_order() -> None:
    rounds = [[shuffled(r * 7 + i, 7, 0, "a") for i in range(7)] for r in range(3)]
    assert all(sorted(r) == list(range(7)) for r in rounds)
    assert rounds[0] != rounds[1]
    assert [shuffled(i, 7, 1, "a") for i in range(7)] != rounds[0]
