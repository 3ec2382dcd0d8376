"""What `galerkin` and `fourier` share: layer norms on two of q, k, v, and a mean over the keys."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from passes.form import Form, FormSpec, Paper, Params, Verdict
from passes.forms._features import head_norm, head_norm_ops, wide
from passes.forms._linear import linear_attention_ops, linear_verdict, sizes
from passes.forms._sums import HUGE, counts, linear_sum, mean_ops, mean_weights
from passes.opcount import OpCount
from passes.site import AttentionSite

NORM_EPS = 1e-5


class OperatorForm(Form):
    """scale q (k^T v) / n over the n visible keys, some of q, k, v layer normed per head."""

    family = "kernelised"
    trainable = True
    needs = "training"
    normalised = False
    paper = Paper(
        "Cao",
        "Choose a Transformer: Fourier or Galerkin",
        2021,
        "https://arxiv.org/abs/2105.14995",
    )
    normed: ClassVar[str]  # which of "qkv"

    @abstractmethod
    def scale(self, spec: FormSpec) -> float:
        """The factor of every weight."""

    def applies(self, site: AttentionSite) -> Verdict:
        """Causal and padding masks, cross attention, grouped heads; no bias, window or tensor."""
        return linear_verdict(site, self.name)

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """`gamma_x` (ones) and `beta_x` (zeros) [H or G, D or E] for each normed x."""
        params = {}
        for name in self.normed:
            heads, width = self._shape(site, name)
            params[f"gamma_{name}"] = torch.ones(heads, width)
            params[f"beta_{name}"] = torch.zeros(heads, width)
        return params

    def _shape(self, site: AttentionSite, name: str) -> tuple[int, int]:
        d = site.dims
        return d.H if name == "q" else d.G, d.E if name == "v" else d.D

    def _norm(self, name: str, x: torch.Tensor, params: Params) -> torch.Tensor:
        if name not in self.normed:
            return wide(x)
        return head_norm(x, params[f"gamma_{name}"], params[f"beta_{name}"], NORM_EPS)

    def attend(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Means over keys [B, H, T, E]."""
        fq, fk, values = (self._norm(n, x, params) for n, x in zip("qkv", (q, k, v), strict=True))
        out = linear_sum(fq, fk, values, key_mask=key_mask, causal=spec.causal)
        number = counts(spec, q.shape[2], key_mask, k.shape[2], q.device)
        return (out * (self.scale(spec) / number.clamp_min(1).to(out.dtype))).to(v.dtype)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """scale q.k / n [B, H, T, S], of any sign; they meet v after its norm, where it has one."""
        fq, fk = self._norm("q", q, params), self._norm("k", k, params)
        return mean_weights(fq, fk, spec, key_mask, self.scale(spec)).to(q.dtype)

    def ops(self, site: AttentionSite) -> OpCount:
        """Norms, sums, the division by the number of keys."""
        b, h, g, t, s, d, e = sizes(site)
        total = linear_attention_ops(site, d) + mean_ops(site)
        rows = {"q": (b * h * t, d), "k": (b * g * s, d), "v": (b * g * s, e)}
        for name in self.normed:
            number, width = rows[name]
            total += head_norm_ops(number, width, self._shape(site, name)[0], site)
        return total

    def kernel(
        self,
        kit: Any,
        spec: FormSpec,
        params: Mapping[str, Any],
        q: Any,
        k: Any,
        v: Any,
        key_mask: Any = None,
        bias: Any = None,
    ) -> Any:
        """Norms, sums, division."""
        dtype, scale = kit.dtype(v), self.scale(spec)
        data = dict(zip("qkv", (kit.cast(x, "float32") for x in (q, k, v)), strict=True))
        for n in self.normed:
            weights = (kit.cast(params[f"{w}_{n}"], "float32") for w in ("gamma", "beta"))
            data[n] = kit.head_norm(data[n], *weights, NORM_EPS)
        number = kit.counts(q, k, key_mask, causal=spec.causal, scale=scale)
        out = kit.linear_sum(data["q"], data["k"], data["v"], key_mask=key_mask, causal=spec.causal)
        return kit.cast(kit.divide(out, number, 0.5 / (scale * HUGE)), dtype)
