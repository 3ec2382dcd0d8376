"""Two stages of training, and what is told of the routing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes.errors import UsageError
from passes.linears import linear_modules
from passes.moe_balance import Balance
from rewriter import linear_train
from rewriter.api import fine_tune
from rewriter.linear_train import recover
from rewriter.moe_routing import POINTS, Watched, routing
from rewriter.report import RewriteReport
from rewriter.supervised import Rates

PATCH = 4


class Vit(nn.Module):
    """Patches of an image behind one more token; attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, PATCH, PATCH)
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.qk, self.up, self.down, self.head = (
            nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1)
        q = self.qk(x)[:, None]
        x = x + nn.functional.scaled_dot_product_attention(q, q, x[:, None])[:, 0]
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x)


def images(*lead: int) -> Tensor:
    return torch.randn(*lead, 3, 5 * PATCH, 3 * PATCH)


@pytest.fixture
def result() -> Any:
    return rewriter.rewrite(Vit().eval(), (images(2),), linear="moe:latencies=2/1")


def test_experts_are_trained_first_then_the_routers_too(
    result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = linear_modules(result.model)
    seen: list[tuple[bool, dict[str, Tensor]]] = []
    real = linear_train.fine_tune

    def watched(*args: Any, **options: Any) -> Any:
        frozen = not any(m.params["router"].requires_grad for m in layers.values())
        done = real(*args, **options)
        seen.append((frozen, copy.deepcopy(layers["down"].params.state_dict())))
        return done

    monkeypatch.setattr(linear_train, "fine_tune", watched)
    before = copy.deepcopy(layers["down"].params.state_dict())
    assert set(layers) == {"up", "down"}
    monkeypatch.setattr(linear_train, "RATE", 2e-3)
    recover(result, [{"image": images(2)}] * 8, seconds=1200.0, steps=25)
    assert [frozen for frozen, _ in seen] == [True, False]
    first, second = (state for _, state in seen)
    assert torch.equal(before["router"], first["router"])
    assert not torch.equal(before["multiply"], first["multiply"])
    assert not torch.equal(before["weight"], first["weight"])
    assert all(m.params["router"].requires_grad for m in layers.values())
    assert second["router"].isfinite().all()
    notes = result.report.notes
    assert "Experts trained, routers as they were made" in notes[-2]
    assert "Routers trained too, with 0.01 of the balance" in notes[-1]
    history = result.report.experts["training"]
    steps = result.report.fit["linears"]["trained"][1]["steps"]  # fewer than 25 if stopped early
    assert [row["step"] for row in history] == list(range(1, steps + 1))
    assert all(0 <= row["shift"] <= 1 and row["balance"] >= 0 for row in history)


def test_a_fit_trains_the_routers_too() -> None:
    result = rewriter.rewrite(
        Vit().eval(),
        (images(2),),
        linear="moe:latencies=2/1",
        fit_seconds=1.0,
        data=[{"image": images(2)} for _ in range(8)],
    )
    assert result.report.experts["training"]
    assert any("Routers trained too" in note for note in result.report.notes)


def test_a_loss_of_ones_own_is_balanced_too(result: Any) -> None:
    data = [{"image": images(2), "wanted": torch.randn(2, 16, 5)} for _ in range(8)]
    losses: list[float] = []

    def task(outputs: Tensor, batch: Any) -> Tensor:
        losses.append(float((outputs - batch["wanted"]).square().mean().detach()))
        return (outputs - batch["wanted"]).square().mean()

    done = fine_tune(result, data, task, seconds=600.0, rates=Rates(steps=6))
    assert done.steps == 6
    history = result.report.experts["training"]
    assert [row["step"] for row in history] == list(range(1, 7))
    assert all(row["task"] in losses for row in history)


def test_the_routing_counts_every_token_and_maps_the_patches(result: Any) -> None:
    x = images(2)
    up = linear_modules(result.model)["up"]
    with torch.no_grad():
        up.params["router"][0].zero_()
    with Balance(result.model) as balance:
        result.model(x)
    choice = balance.logits["up"].argmax(-1).view(2, 16)
    (row, other) = routing(result.model, [{"image": x}, {"image": images(2)}])
    assert (row.layer, other.layer) == ("up", "down")
    assert row.multiply + row.shift == 2 * 2 * 16
    assert row.patches == choice[0, 1:].view(5, 3).tolist()
    assert 0 <= row.share <= 1
    kept = RewriteReport.from_json(result.report.to_json())
    assert kept.experts == result.report.experts
    assert [r["layer"] for r in kept.experts["routing"]] == ["up", "down"]


def test_inputs_that_are_no_image_have_no_map() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q = self.a(x)[:, None]
            y = nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]
            return self.c(self.b(y))

    made = rewriter.rewrite(Text().eval(), (torch.randn(1, 9, 16),), linear="moe:latencies=2/1")
    (row,) = made.report.experts["routing"]
    assert (row["multiply"] + row["shift"], row["patches"]) == (9, None)
    with pytest.raises(UsageError, match="two-expert"):
        routing(Text(), [{"x": torch.randn(1, 9, 16)}])


def test_a_history_is_thinned_and_looks_are_left_out(result: Any) -> None:
    with Watched(Balance(result.model), lambda out, batch: out.square().mean(), 0.5) as watched:
        result.model(images(2))
        for _ in range(POINTS + 50):
            total = watched.loss(torch.ones(2), {})
        with torch.no_grad():
            watched.loss(torch.ones(2), {})
    assert len(watched.rows) == POINTS + 50
    assert len(watched.history()) <= POINTS
    assert total.item() == pytest.approx(1 + 0.5 * watched.rows[-1]["balance"], rel=1e-5)
