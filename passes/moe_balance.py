"""Balance of two-expert layers by latency: the loss that trains their routers, and what they do.

With importance imp_i = a_i sum_x p_i(x) and load load_i = a_i sum_x q_i(x), a_i an expert's share
of the latencies, p its probability and q the probability that it wins under Gaussian noise on its
logit: loss = SCV(imp) + SCV(load), SCV(v) = variance / (mean^2 + 1e-10). It is least where both
experts take the same time. Probabilities of winning are compared in the space of logits.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import UsageError
from passes.linear_forms.moe import EXPERTS, Moe
from passes.linears import LinearModule, linear_modules

NOISE = 0.5  # standard deviation on a logit: one over the number of experts


def balance_loss(logits: Tensor, latencies: tuple[float, float]) -> Tensor:
    """The loss of one layer from its logits [tokens, 2]; 0 without tokens."""
    if logits.shape[0] == 0:
        return logits.sum()
    times = torch.tensor(latencies, dtype=logits.dtype, device=logits.device)
    share = times / times.sum()
    importance = share * logits.softmax(dim=-1).sum(dim=0)
    ahead = (logits - logits.flip(-1)) / NOISE
    load = share * torch.special.ndtr(ahead).sum(dim=0)
    return _variation(importance) + _variation(load)


def _variation(value: Tensor) -> Tensor:
    return value.var(unbiased=True) / (value.mean().square() + 1e-10)


class Balance:
    """Watches the two-expert layers of a model while it runs::

    with Balance(model) as balance:
        loss = task(model(x)) + 0.01 * balance.loss()
    """

    def __init__(self, model: nn.Module) -> None:
        named = linear_modules(model).items()
        self.layers = {i: m for i, m in named if isinstance(m.form, Moe)}
        if not self.layers:
            raise UsageError("model: has no two-expert layer; rewrite it with linear='moe'")
        self.logits: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Balance:
        self.logits = {}
        for layer in self.layers.values():
            self._hooks.append(layer.register_forward_pre_hook(self._watch))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _watch(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, LinearModule)
        assert isinstance(module.form, Moe)
        self.logits[module.layer.id] = module.form.logits(dict(module.params.items()), args[0])

    def loss(self) -> Tensor:
        """The mean over the layers that ran; UsageError if none did."""
        if not self.logits:
            raise UsageError("balance: call the model inside `with Balance(model)` first")
        parts = []
        for layer, logits in self.logits.items():
            form = self.layers[layer].form
            assert isinstance(form, Moe)
            parts.append(balance_loss(logits, form.times(self.layers[layer].spec)))
        return torch.stack(parts).mean()

    def shares(self) -> dict[str, dict[str, float]]:
        """Layer -> expert -> share of the tokens that went to it."""
        made = {}
        for layer, logits in self.logits.items():
            first = float((logits.argmax(dim=-1) == 0).float().mean()) if len(logits) else 0.0
            made[layer] = dict(zip(EXPERTS, (first, 1.0 - first), strict=True))
        return made
