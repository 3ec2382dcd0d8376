"""moe: two experts, dispatched for real, balanced by latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from passes.errors import FormError, NothingRewritten, UsageError
from passes.linear_form import LinearSpec
from passes.linear_forms import moe as moe_file
from passes.linear_forms.moe import Moe
from passes.linears import linear_modules
from passes.moe_balance import Balance, balance_loss


def made(n: int = 9, k: int = 24, **config: Any) -> tuple[Moe, dict[str, Tensor]]:
    form = Moe(config)
    return form, form.convert(torch.randn(n, k) * 0.2, torch.randn(n))


def test_a_token_is_computed_once_by_its_own_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    form, params = made()
    x, rows = torch.randn(3, 50, 24), []

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append(len(x) if len(weight) == 9 else 0)
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(moe_file, "linear", watched)
    out = form.forward(params, x)
    assert sum(rows) == 150
    assert max(rows) < 150
    choice = form.logits(params, x).argmax(-1).view(3, 50, 1)
    both = [x @ w.T + params["bias"] for w in (params["multiply"], form.weight(params))]
    torch.testing.assert_close(out, torch.where(choice == 0, *both))


@pytest.mark.parametrize("expert", [0, 1])
def test_an_expert_without_tokens(expert: int) -> None:
    form, params = made()
    params["router"] = torch.zeros(2, 24)
    params["router"][1 - expert] = -1.0
    params["router"][expert] = 1.0
    x = torch.rand(7, 24) + 0.1
    weight = (params["multiply"], form.weight(params))[expert]
    torch.testing.assert_close(form.forward(params, x), x @ weight.T + params["bias"])
    assert form.forward(params, x[:0]).shape == (0, 9)
    assert balance_loss(form.logits(params, x[:0]), (6.0, 4.0)) == 0
    assert balance_loss(form.logits(params, x), (6.0, 4.0)) > 1


def test_the_task_reaches_router_and_both_experts() -> None:
    for gate in ("through", "value"):
        form, params = made(gate=gate)
        leaves = {n: p.requires_grad_(n not in form.frozen) for n, p in params.items()}
        form.forward(leaves, torch.randn(64, 24)).square().mean().backward()
        for name in ("router", "multiply", "weight", "bias"):
            grad = leaves[name].grad
            assert grad is not None
            assert grad.abs().sum() > 0, (gate, name)


@pytest.mark.parametrize("latencies", [(6.0, 4.0), (1.0, 3.0)])
def test_the_loss_is_least_where_the_experts_take_the_same_time(
    latencies: tuple[float, float],
) -> None:
    x = torch.randn(600, 24)
    router = torch.zeros(2, 25, requires_grad=True)
    with torch.no_grad():
        router += torch.randn(2, 25) * 0.5
    wide = torch.cat([x, torch.ones(600, 1)], dim=1)
    optimiser = torch.optim.Adam([router], lr=0.05)
    for _ in range(150):
        loss = balance_loss(wide @ router.T, latencies)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 1e-2
    first = (wide @ router.T).softmax(-1)[:, 0].mean().item()
    assert abs(first - latencies[1] / sum(latencies)) < 0.05


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q = self.a(x)[:, None]
        y = nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]
        return self.c(torch.relu(self.b(y)))


def test_a_model_trains_with_both_losses_and_is_compiled(tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(8, 6, 16)
    result = rewriter.rewrite(model, (x,), linear="moe")
    gap = (result.model(x) - model(x)).norm() / model(x).norm()
    assert gap < 0.5
    optimiser = torch.optim.Adam([p for p in result.model.parameters() if p.requires_grad], lr=5e-3)
    with torch.no_grad():
        layer = linear_modules(result.model)["b"]
        for name in ("multiply", "weight"):
            layer.params[name].add_(torch.randn(16, 16) * 0.2)
    wanted, losses = model(x).detach(), []
    for _ in range(60):
        with Balance(result.model) as balance:
            task = (result.model(x) - wanted).square().mean()
            loss = task + 0.01 * balance.loss()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(task.item())
    # the balance moves tokens meanwhile, so single steps go both ways
    assert min(losses[-20:]) < losses[0]
    shares = balance.shares()
    assert set(shares) == {"b"}
    assert abs(sum(shares["b"].values()) - 1) < 1e-6
    artifact = rewriter.compile(result, path=tmp_path / "m.rwa")
    (out,) = artifact(x.numpy()).values()
    torch.testing.assert_close(torch.as_tensor(out), result.model(x), rtol=1e-3, atol=1e-3)
    rules = {k.name: k.scheduled_by for k in result.report.kernels}
    assert rules["two_experts"] == "dispatch"


class Tied(Net):
    """One layer used twice, one of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b(x)


def test_layers_that_share_their_weight_are_refused() -> None:
    x = torch.randn(2, 6, 16)
    with pytest.raises(NothingRewritten, match=r"moe: S01: its weight is also used by"):
        rewriter.rewrite(Tied().eval(), (x,), linear="moe,b*")
    result = rewriter.rewrite(Tied().eval(), (x,), linear="moe:latencies=1/1,*")
    assert {i: str(c.status) for i, c in result.plan.linears.items()} == {
        "a": "KEPT", "b": "REFUSED", "b#1": "KEPT", "c": "REWRITTEN",
    }  # fmt: skip


def test_wrong_use_is_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"bits": 9}, {"latencies": [1]}, {"latencies": (0, 1)}, {"latencies": "x"}, {"gate": 1},
    ]  # fmt: skip
    for config in wrong:
        with pytest.raises(UsageError):
            Moe(config)
    for value in (float("nan"), float("inf")):
        with pytest.raises(FormError, match=r"moe: .* not finite"):
            Moe().convert(torch.tensor([[1.0, value]]), None)
    with pytest.raises(UsageError, match="two-expert"):
        Balance(nn.Linear(2, 2))
    form, _ = made()
    ops = form.ops(LinearSpec("moe", 24, 9, True, {}), 100)
    assert ops.ops[("mul", "float32")] > 2 * 100 * 24
