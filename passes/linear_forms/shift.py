"""shift: weights that are signed powers of two, so that a product is a shift (DeepShift).

``w = s 2^(p + base_n)``: p of a few bits, one power of two `base_n` for each output (0 with
``base="one"``, as published, which needs weights in [-1, 1]). Two ways to train: Q keeps a real
weight and rounds it; PS keeps the sign and the exponent themselves. Both pass the gradient
through the rounding unchanged. A weight below half the lowest power is 0 (published: the lowest
power), and an exact 0 stays 0 in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passes.errors import UsageError
from passes.form import FormConfig, Paper
from passes.linear_form import LinearForm, LinearSpec, finite
from passes.linear_forms._coded_ops import coded_ops
from passes.linear_forms._codes import CodeSpec, nearest, pack, rounded, unpack, value_of
from passes.linear_forms._fixed import fixed_ops, packed_fixed, run_fixed
from passes.opcount import OpCount

_CHOICES = {
    "train": ("q", "ps"),
    "base": ("row", "one"),
    "activations": ("float", "fixed", "integer"),
}
FIXED = 1 << 16  # fixed point: 16 bits before and 16 behind the point
FIXED_LIMIT = 1 << 15


@dataclass(frozen=True)
class ShiftConfig(FormConfig):
    """bits 3 to 5 (sign included); terms 1, or 2 (sums of two powers, APoT; 5 bits); train "q" or
    "ps"; base "row" (a power of two for each output) or "one"; activations "float", "fixed"
    (rounded down to 16 bits before and 16 behind the point) or "integer" (int32 with `fraction`
    bits behind the point, 4 to 24; the whole product is shifts and additions of integers)."""

    bits: int = 4
    terms: int = 1
    train: str = "q"
    base: str = "row"
    activations: str = "float"
    fraction: int = 16

    def __post_init__(self) -> None:
        if self.bits not in (3, 4, 5):
            raise UsageError(f"bits: shift weights have 3 to 5 bits, got {self.bits!r}")
        if self.terms not in (1, 2) or (self.terms == 2 and self.bits != 5):
            raise UsageError(
                f"terms: 1, or 2 with 5 bits; got {self.terms!r} with {self.bits} bits"
            )
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise UsageError(f"{name}: must be {' or '.join(known)}, got {given!r}")
        if type(self.fraction) is not int or not 4 <= self.fraction <= 24:
            raise UsageError(f"fraction: a whole number from 4 to 24, got {self.fraction!r}")
        if self.terms == 2 and self.train == "ps":
            raise UsageError("train: ps trains one sign and one exponent; two terms need train=q")


class Shift(LinearForm):
    """Signed powers of two of a few bits."""

    name = "shift"
    paper = Paper(
        "Elhoushi et al.",
        "DeepShift: Towards Multiplication-Less Neural Networks",
        2021,
        "https://arxiv.org/abs/1905.13298",
    )
    formula = "y_n = 2^(base_n) sum_k s_nk 2^(p_nk) x_k"
    needs = "training"
    frozen = frozenset({"base"})
    Config = ShiftConfig
    config: ShiftConfig

    @property
    def codes(self) -> CodeSpec:
        """What the codes stand for."""
        return CodeSpec(self.config.bits, self.config.terms)

    def convert(
        self, weight: Tensor, bias: Tensor | None, x: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Q: "weight"; PS: "shift" and "sign"; and "base" [N], the outputs' exponents."""
        weight = finite(weight, self.name)
        base = _best_base(weight, self.codes) if self.config.base == "row" else None
        base = weight.new_zeros(len(weight)) if base is None else base
        made: dict[str, Tensor] = {"base": base}
        if self.config.train == "q":
            made["weight"] = weight.clone()
        else:
            value = value_of(nearest(_scaled(weight, base), self.codes), self.codes)
            made["sign"] = value.sign()
            made["shift"] = torch.where(value == 0, -self._lowest, value.abs().log2()).float()
        if bias is not None:
            made["bias"] = bias.detach().clone()
        return made

    @property
    def _lowest(self) -> float:
        return float((1 << (self.config.bits - 1)) - 2)

    def _codes(self, params: Mapping[str, Tensor]) -> Tensor:
        if "weight" in params:
            return nearest(_scaled(params["weight"], params["base"]), self.codes)
        most = (1 << (self.config.bits - 1)) - 1
        shift = params["shift"].detach().clamp(-self._lowest, 0).round()
        sign = params["sign"].detach().round().sign()
        magnitude = torch.where(sign == 0, 0, shift + most)
        negative = (sign < 0).long() << (self.config.bits - 1)
        return magnitude.long() + negative

    def weight(self, params: Mapping[str, Tensor]) -> Tensor:
        """The rounded weight; its gradient goes to the real one (Q), or to shift and sign (PS)."""
        if "weight" in params:
            return _through(params["weight"], lambda w: self._rounded(w, params["base"]))
        power = torch.exp2(_through(params["shift"].clamp(-self._lowest, 0), torch.round))
        sign = _through(params["sign"], lambda s: s.round().sign())
        made = power * sign.detach() + (sign - sign.detach())
        return torch.ldexp(made, params["base"].to(made)[:, None])

    def _rounded(self, weight: Tensor, base: Tensor) -> Tensor:
        value = rounded(_scaled(weight, base), self.codes)
        return torch.ldexp(value, base.to(value)[:, None])

    def inputs(self, x: Tensor) -> Tensor:
        """x, or x rounded down to fixed point."""
        if self.config.activations == "float":
            return x
        if self._integer:
            return x
        low, high = -float(FIXED_LIMIT), FIXED_LIMIT - 1.0
        return _through(x.clamp(low, high), lambda v: torch.floor(v * FIXED) / FIXED)

    def forward(
        self, params: Mapping[str, Tensor], x: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """As `LinearForm`; with integers their value, and the gradient of the float product."""
        made = super().forward(params, x, weight)
        if not self._integer:
            return made
        outputs, inputs = params["weight" if "weight" in params else "shift"].shape
        spec = LinearSpec(self.name, inputs, outputs, "bias" in params, self.config.to_json())
        packed = {n: p.to(x.device) for n, p in self.pack(params).items()}
        exact = run_fixed(spec, self.codes, packed, self.config.fraction, x.detach())
        return made + (exact - made).detach()

    @property
    def _integer(self) -> bool:
        return self.config.activations == "integer"

    def run_packed(self, spec: LinearSpec, packed: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """As `LinearForm`; integers as the kernel has them."""
        if self._integer:
            return run_fixed(spec, self.codes, packed, self.config.fraction, x)
        return super().run_packed(spec, packed, x)

    def pack(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`words` int32 (passes/linear_forms/_codes.py) and `scale` float32 [N]; with integers
        `base`, `offset` and `limit` (passes/linear_forms/_fixed.py) in place of `scale`."""
        if self._integer:
            codes, fraction = self._codes(params), self.config.fraction
            rest = packed_fixed(codes, params["base"], params.get("bias"), self.codes, fraction)
            return {"words": pack(codes, self.codes), **rest}
        scale = torch.ldexp(torch.ones_like(params["base"]), params["base"]).float()
        return {"words": pack(self._codes(params), self.codes), "scale": scale.detach().cpu()}

    def packed_names(self, spec: LinearSpec) -> tuple[str, ...]:
        """words, scale; or words, base, offset, limit."""
        return ("words", "base", "offset", "limit") if self._integer else ("words", "scale")

    def unpack(self, spec: LinearSpec, packed: Mapping[str, Tensor]) -> Tensor:
        """The weight [N, K] float32."""
        codes = unpack(packed["words"], self.codes, (spec.outputs, spec.inputs))
        value = value_of(codes, self.codes)
        if self._integer:
            return torch.ldexp(value, packed["base"].to(value)[:, None])
        return value * packed["scale"][:, None]

    def ops(self, spec: LinearSpec, rows: int) -> OpCount:
        """As the kernels of codegen/kernels/coded.py (or fixed.py, integers) do."""
        if self._integer:
            return fixed_ops(self.codes, spec, rows)
        return coded_ops(self.codes, spec, rows)

    def kernel(self, kit: Any, spec: LinearSpec, packed: Mapping[str, Any], x: Any) -> Any:
        """Packed codes, expanded in registers."""
        if self._integer:
            tensors = [packed[n] for n in self.packed_names(spec)]
            return kit.fixed_linear(x, *tensors, self.codes, self.config.fraction)
        if self.config.activations == "fixed":
            x = kit.fixed_point(x, FIXED, FIXED_LIMIT)
        bias = packed.get("bias")
        return kit.coded_linear(x, packed["words"], packed["scale"], bias, self.codes)


def _through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounding(x)` with the gradient of x."""
    return x + (rounding(x) - x).detach()


def _scaled(weight: Tensor, base: Tensor) -> Tensor:
    return torch.ldexp(weight.detach(), -base.to(weight)[:, None])


def _best_base(weight: Tensor, codes: CodeSpec) -> Tensor:
    """For each output the power of two under which its rounded weights are nearest; 0 for zeros.

    The largest level stands just below, at or above the largest weight.
    """
    largest = weight.abs().amax(dim=1)
    start = torch.where(largest > 0, largest, torch.ones_like(largest)).log2().floor()
    best, least = torch.zeros_like(start), torch.full_like(start, torch.inf)
    for step in (1, 0, -1):
        base = (start + step).clamp(-100, 100)
        value = rounded(_scaled(weight, base), codes)
        error = (torch.ldexp(value, base[:, None]) - weight).double().square().sum(dim=1)
        better = error < least
        best, least = torch.where(better, base, best), torch.where(better, error, least).float()
    return torch.where(largest > 0, best, torch.zeros_like(best))
