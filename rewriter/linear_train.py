"""Training of rewritten linear layers towards the original's outputs, without labels.

Two-expert layers (`moe`) are trained in two stages: first the experts and all other weights, while
the routers stay as they were made (each expert then sees about half of the tokens, of all kinds);
then everything with the routers, under the loss that balances the experts by their latencies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passes.linear_forms.moe import Moe
from passes.linears import linear_modules
from passes.moe_balance import Balance
from rewriter.calibration import input_names, set_aside
from rewriter.fit_loss import floating, masked_error
from rewriter.fit_model import frozen
from rewriter.moe_routing import Watched, tell_routing
from rewriter.supervised import FineTuned, Rates, fine_tune

if TYPE_CHECKING:
    from rewriter.api import Result

Batches = Sequence[Mapping[str, Tensor]]
Loss = Callable[[Any, Mapping[str, Tensor]], Tensor]
RATE = 2e-4
BALANCE = 0.01  # weight of the loss that balances experts by latency


def recover(
    result: Result,
    data: Batches,
    *,
    seconds: float,
    steps: int = 0,
    progress: Callable[..., None] | None = None,
) -> None:
    """Train the rewritten model towards the original's outputs, in place; the report is completed.

    The forms' rounding passes gradients through; the best state on batches set aside is kept.

    Args:
        result: its model is trained.
        data: batches of model inputs.
        seconds: wall-clock budget; with two-expert layers half of it for each stage.
        steps: at most this many steps a stage (0: only time counts).
        progress: as of `rewriter.supervised.fine_tune`.
    """
    rates = Rates(forms=RATE, weights=RATE, steps=steps)
    loss, routers = _towards(result), _routers(result.rewritten.module)
    if not routers:
        done = fine_tune(
            result.rewritten, data, loss, seconds=seconds, rates=rates, progress=progress
        )
        result.report = result.report.with_notes(_told("Linear layers trained", done))
        result.report = result.report.with_linear_fit(trained=[done.to_json()])
        return
    half: dict[str, Any] = {"seconds": seconds / 2, "rates": rates, "progress": progress}
    with frozen(routers):
        first = fine_tune(result.rewritten, data, loss, **half)
    with balanced(result, loss) as both:
        second = fine_tune(result.rewritten, data, both, **half)
    result.report = result.report.with_notes(
        _told("Experts trained, routers as they were made", first),
        _told(f"Routers trained too, with {BALANCE} of the balance", second),
    )
    result.report = result.report.with_linear_fit(trained=[first.to_json(), second.to_json()])
    _, held = set_aside([dict(b) for b in data])
    tell_routing(result, held)


@contextlib.contextmanager
def balanced(result: Result, task: Loss) -> Iterator[Loss]:
    """`task` with `BALANCE` of the balance where the model has two-expert layers, to train on.

    Afterwards the report of `result` holds what the balance did.
    """
    module = result.rewritten.module
    if not _routers(module):
        yield task
        return
    watched = Watched(Balance(module), task, BALANCE)
    with watched:
        yield watched.loss
    result.report = result.report.with_experts(training=watched.history())


def _told(what: str, done: FineTuned) -> str:
    return (
        f"{what} towards the original without labels: relative squared error "
        f"{done.loss_before:.4g} -> {done.loss_after:.4g} in {done.steps} steps."
    )


def _towards(result: Result) -> Loss:
    """The loss: how far outputs are from those of the original."""
    original, names = result.traced.module, set(input_names(result.traced))

    def loss(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = floating(original(**{n: v for n, v in batch.items() if n in names}))
        pairs = zip(floating(outputs), wanted, strict=True)
        return torch.stack([masked_error(got, want, batch) for got, want in pairs]).sum()

    return loss


def _routers(module: nn.Module) -> list[nn.Parameter]:
    """The routers of all two-expert layers."""
    layers = linear_modules(module).values()
    return [m.params["router"] for m in layers if isinstance(m.form, Moe)]
