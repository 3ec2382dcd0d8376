"""shiftadd_ptq: weights as sums of signed binary codes, found from calibration inputs alone.

``w_nk = 2^(base_n) sum_r alpha_kr b_nkr`` with b = +-1 and alpha a sum of a few powers of two, one
set of alphas for each input. As in ShiftAddLLM the codes are found column by column: what a column
is off is made up for by the columns after it, weighed by the inverse Hessian of the layer's inputs
(GPTQ). The alphas of a block of columns are fitted by turns with the codes when the block starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passes.errors import FormError, UsageError
from passes.form import FormConfig, Paper
from passes.linear_form import LinearForm, LinearSpec, finite
from passes.linear_forms._binary import fit_alphas, levels_of, nearest_codes, summed
from passes.linear_forms._coded_ops import binary_ops
from passes.linear_forms._codes import CodeSpec, pack, unpack
from passes.opcount import OpCount

_BLOCK = 32  # columns whose alphas are fitted together


@dataclass(frozen=True)
class PtqConfig(FormConfig):
    """bits 2 to 4 (codes for each weight); terms 1 to 4 (powers of two in an alpha); damping of
    the Hessian, as a share of its mean diagonal."""

    bits: int = 4
    terms: int = 3
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise UsageError(f"bits: shiftadd_ptq has 2 to 4 bits, got {self.bits!r}")
        if self.terms not in (1, 2, 3, 4):
            raise UsageError(f"terms: 1 to 4 powers of two in a scale, got {self.terms!r}")
        if not isinstance(self.damping, (int, float)) or not 0 < self.damping <= 1:
            raise UsageError(f"damping: must be above 0 and at most 1, got {self.damping!r}")


class ShiftAddPtq(LinearForm):
    """Binary codes with scales of powers of two, without training."""

    name = "shiftadd_ptq"
    paper = Paper(
        "You et al.",
        "ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training "
        "Multiplication-Less Reparameterization",
        2024,
        "https://arxiv.org/abs/2406.05981",
    )
    formula = "y_n = 2^(base_n) sum_k sum_r b_nkr (alpha_kr x_k), b = +-1"
    needs = "calibration"
    frozen = frozenset({"codes", "alpha", "base"})
    Config = PtqConfig
    config: PtqConfig

    @property
    def codes(self) -> CodeSpec:
        """How the codes are packed."""
        return CodeSpec(self.config.bits)

    def convert(
        self, weight: Tensor, bias: Tensor | None, x: Tensor | None = None
    ) -> dict[str, Tensor]:
        """ "codes" [N, K] (whole numbers), "alpha" [K, bits], "base" [N] exponents.

        Without `x` every weight is rounded on its own.
        """
        weight = finite(weight, self.name)
        if x is not None and not bool(x.isfinite().all()):
            raise FormError(f"{self.name}: the calibration inputs are not finite")
        base = _base(weight)
        scaled = torch.ldexp(weight, -base[:, None])
        codes, alpha = self._columns(scaled, self._spread(x, weight.shape[1]))
        made = {"codes": codes.to(torch.float16), "alpha": alpha, "base": base}
        return made if bias is None else {**made, "bias": bias.detach().clone()}

    def _spread(self, x: Tensor | None, inputs: int) -> Tensor:
        """The upper Cholesky factor of the inverse Hessian: how an error is made up for."""
        if x is None:
            return torch.eye(inputs)
        x = x.double()
        hessian = x.T @ x / max(1, len(x))
        mean = hessian.diagonal().mean().clamp_min(1e-12)
        hessian += self.config.damping * mean * torch.eye(inputs, dtype=torch.float64)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
        return upper

    def _columns(self, weight: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        left, (outputs, inputs) = weight.clone(), weight.shape
        codes = torch.zeros(outputs, inputs)
        alpha = torch.zeros(inputs, self.config.bits)
        for start in range(0, inputs, _BLOCK):
            stop = min(start + _BLOCK, inputs)
            alpha[start:stop] = fit_alphas(left[:, start:stop], self.config.bits, self.config.terms)
            wrong = torch.zeros(outputs, stop - start)
            for k in range(start, stop):
                column = left[:, k].clone()
                codes[:, k] = nearest_codes(column[:, None], alpha[k : k + 1])[:, 0]
                off = column - levels_of(alpha[k : k + 1])[0][codes[:, k].long()]
                wrong[:, k - start] = off / spread[k, k]
                left[:, k:stop] -= wrong[:, k - start, None] * spread[k, k:stop]
            left[:, stop:] -= wrong @ spread[start:stop, stop:]
        return codes, alpha

    def weight(self, params: Mapping[str, Tensor]) -> Tensor:
        """[N, K] float32."""
        value = summed(params["codes"].long(), params["alpha"])
        return torch.ldexp(value, params["base"].to(value)[:, None])

    def pack(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`words` int32, `scale` float32 [N], `alpha` float32 [K, bits]."""
        base = params["base"].detach().float().cpu()
        return {
            "words": pack(params["codes"].detach().long(), self.codes),
            "scale": torch.ldexp(torch.ones_like(base), base),
            "alpha": params["alpha"].detach().float().cpu(),
        }

    def packed_names(self, spec: LinearSpec) -> tuple[str, ...]:
        """words, scale, alpha."""
        return ("words", "scale", "alpha")

    def unpack(self, spec: LinearSpec, packed: Mapping[str, Tensor]) -> Tensor:
        """[N, K] float32."""
        codes = unpack(packed["words"], self.codes, (spec.outputs, spec.inputs))
        return summed(codes, packed["alpha"]) * packed["scale"][:, None]

    def ops(self, spec: LinearSpec, rows: int) -> OpCount:
        """As the kernels of codegen/kernels/binary.py do."""
        return binary_ops(self.codes, spec, rows)

    def kernel(self, kit: Any, spec: LinearSpec, packed: Mapping[str, Any], x: Any) -> Any:
        """The inputs are scaled once by the alphas; then only additions under signs."""
        bias = packed.get("bias")
        return kit.binary_linear(
            x, packed["words"], packed["scale"], packed["alpha"], bias, self.codes
        )


def _base(weight: Tensor) -> Tensor:
    """For each output the exponent of its weights' root mean square; 0 for zeros."""
    size = weight.square().mean(dim=1).sqrt()
    return torch.where(size > 0, size, torch.ones_like(size)).log2().round().clamp(-100, 100)
