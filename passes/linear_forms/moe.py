"""moe: two experts for each token, a product and a shift layer, chosen by a router (ShiftAddViT).

Both experts start from the trained weight. A token goes to the expert with the larger logit and
only there. Its output is multiplied by the winner's probability (``gate="value"``, as published),
or by one with that probability's gradient (``gate="through"``, the default: the converted layer
then computes what its experts compute). The loss that balances the experts by their latencies is
in passes/moe_balance.py, the compiled layer in codegen/kernels/dispatch.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from passes.errors import UsageError
from passes.form import FormConfig, Paper
from passes.linear_form import LinearForm, LinearSpec, finite
from passes.linear_forms._codes import PANEL
from passes.linear_forms.shift import Shift
from passes.opcount import OpCount

EXPERTS = ("multiply", "shift")


@dataclass(frozen=True)
class MoeConfig(FormConfig):
    """bits of the shift expert, 3 to 5; latencies of the experts (multiply, shift) in any unit, as
    two numbers or "6/4" (published), none: measured or counted when the layer is made; source:
    where they are from; gate "through" or "value"."""

    bits: int = 4
    latencies: Sequence[float] | str | None = None
    source: str = ""
    gate: str = "through"

    def __post_init__(self) -> None:
        Shift({"bits": self.bits})
        if self.latencies is not None:
            object.__setattr__(self, "latencies", _two(self.latencies))
        if not isinstance(self.source, str):
            raise UsageError(f"source: must be text, got {self.source!r}")
        if self.gate not in ("through", "value"):
            raise UsageError(f"gate: must be through or value, got {self.gate!r}")


def _two(given: Any) -> list[float]:
    """Two positive numbers; `UsageError` for anything else."""
    times = given.split("/") if isinstance(given, str) else given
    if not isinstance(times, (list, tuple)) or len(times) != 2:
        raise UsageError(f"latencies: two numbers (multiply, shift) or 'A/B', got {given!r}")
    try:
        made = [float(t) for t in times]
    except (TypeError, ValueError):
        made = []
    if not made or not all(0 < t < float("inf") for t in made):
        raise UsageError(f"latencies: must be positive numbers, got {given!r}")
    return made


class Moe(LinearForm):
    """A mixture of a product and a shift layer."""

    name = "moe"
    paper = Paper(
        "You et al.",
        "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer",
        2023,
        "https://arxiv.org/abs/2306.06446",
    )
    formula = "y = E_j(x), j = argmax router(x), E = (W x + b, shift(W') x + b)"
    needs = "training"
    jumps = True
    frozen = frozenset({"base"})
    Config = MoeConfig
    config: MoeConfig

    @property
    def shift(self) -> Shift:
        """The second expert's form."""
        return Shift({"bits": self.config.bits})

    def convert(
        self, weight: Tensor, bias: Tensor | None, x: Tensor | None = None
    ) -> dict[str, Tensor]:
        """ "multiply" [N, K], "weight" and "base" of the shift expert, "router" [2, K] and bias.

        The router starts as one random direction and its opposite, so that tokens go to both
        experts. Its logits are about as large as the inputs: much smaller ones would let the
        balance of probabilities be reached with nearly all tokens at one expert.
        """
        weight = finite(weight, self.name)
        made = self.shift.convert(weight, bias)
        generator = torch.Generator().manual_seed(weight.shape[0] * 65537 + weight.shape[1])
        row = torch.randn(weight.shape[1], generator=generator).to(weight.device)
        row = row / weight.shape[1] ** 0.5
        return {**made, "multiply": weight.clone(), "router": torch.stack([row, -row])}

    def logits(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """[tokens, 2] of x [..., K]."""
        return linear(x.reshape(-1, x.shape[-1]), params["router"].to(x.dtype))

    def weight(self, params: Mapping[str, Tensor]) -> Tensor:
        """The shift expert's."""
        return self.shift.weight(params)

    def forward(
        self, params: Mapping[str, Tensor], x: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """[..., N]; every token is computed once, by its own expert."""
        shift = self.weight(params) if weight is None else weight
        experts = (params["multiply"], shift)
        return self._sent(x, self.logits(params, x), experts, params.get("bias"))

    def _sent(
        self, x: Tensor, logits: Tensor, experts: tuple[Tensor, Tensor], bias: Tensor | None
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        chance, choice = logits.softmax(dim=-1).max(dim=-1)
        gate = chance if self.config.gate == "value" else 1 + chance - chance.detach()
        out = x.new_zeros(len(tokens), experts[0].shape[0])
        for at, expert in enumerate(experts):
            mine = (choice == at).nonzero()[:, 0]
            bent = None if bias is None else bias.to(x.dtype)
            made = linear(tokens[mine], expert.to(x.dtype), bent)
            out = out.index_copy(0, mine, made * gate[mine, None])
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def pack(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`words` and `scale` of the shift expert; "multiply" [P, K, PANEL] with the columns of a
        panel side by side, zeros behind the last; "router" [2, K]."""
        weight = params["multiply"].detach().float().cpu()
        panels = -(-weight.shape[0] // PANEL)
        whole = weight.new_zeros(panels * PANEL, weight.shape[1])
        whole[: len(weight)] = weight
        return {
            **self.shift.pack(params),
            "multiply": whole.view(panels, PANEL, -1).transpose(1, 2).contiguous(),
            "router": params["router"].detach().float().cpu(),
        }

    def packed_names(self, spec: LinearSpec) -> tuple[str, ...]:
        """multiply, words, scale, router."""
        return ("multiply", "words", "scale", "router")

    def unpack(self, spec: LinearSpec, packed: Mapping[str, Tensor]) -> Tensor:
        """The shift expert's weight [N, K]."""
        return self.shift.unpack(spec, packed)

    def run_packed(self, spec: LinearSpec, packed: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """As `forward`, from packed tensors."""
        multiply = packed["multiply"].transpose(1, 2).flatten(0, 1)[: spec.outputs]
        experts = (multiply, self.unpack(spec, packed))
        return self._sent(x, self.logits(packed, x), experts, packed.get("bias"))

    def kernel(self, kit: Any, spec: LinearSpec, packed: Mapping[str, Any], x: Any) -> Any:
        """One kernel that routes, gathers, multiplies and scatters."""
        named = {n: packed[n] for n in self.packed_names(spec)}
        gate = self.config.gate == "value"
        return kit.two_experts(
            x, **named, bias=packed.get("bias"), codes=self.shift.codes, gate=gate
        )

    def times(self, spec: LinearSpec, rows: int = 64) -> tuple[float, float]:
        """The experts' latencies (multiply, shift) that balance the layer.

        Those of the options; without any the operations of each expert on `rows` tokens.
        """
        known = self.config.latencies
        if known is not None:
            return float(known[0]), float(known[1])
        shift = self.shift.ops(spec, rows).total()
        return float(self._products(spec, rows).total()), float(shift)

    @staticmethod
    def _products(spec: LinearSpec, rows: int) -> OpCount:
        """The multiply expert's operations."""
        products = rows * spec.inputs * spec.outputs
        return OpCount.of(mul=products, add=products + (rows * spec.outputs if spec.bias else 0))

    def ops(self, spec: LinearSpec, rows: int) -> OpCount:
        """As a balanced mixture of two kernels would: tokens in inverse ratio of the latencies."""
        slow, fast = self.times(spec)
        first = round(rows * fast / (slow + fast))
        router = OpCount.of(
            mul=2 * rows * spec.inputs, add=2 * rows * spec.inputs, exp=2 * rows, max=rows
        )
        rest = self.shift.ops(spec, rows - first) if rows > first else OpCount()
        return router + self._products(spec, first) + rest
