"""topk: softmax over the k best keys of each query, the rest by their mean (Mao et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from passes.errors import UsageError
from passes.form import Form, FormConfig, FormSpec, Paper, Params, Reason, Verdict, no
from passes.forms._linear import (
    accumulate_dtype,
    count_dtype,
    group_verdict,
    item_bytes,
    linear_verdict,
    sizes,
)
from passes.forms._rows import scores, times_values
from passes.forms.exact import Exact, _mask
from passes.opcount import OpCount
from passes.site import AttentionSite

_BY_REST = (Reason.MASK_BIAS, Reason.MASK_UNKNOWN, Reason.MASK_WINDOW)
ROUNDS = 31  # of the kernel's search for the k-th best


@dataclass(frozen=True)
class TopkConfig(FormConfig):
    """`best`: keys of each query that count one by one; `rest`: whether the others count at all."""

    best: int = 64
    rest: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.best, bool) or not isinstance(self.best, int) or self.best < 1:
            raise UsageError(f"best: a whole number from 1, got {self.best!r}")
        if not isinstance(self.rest, bool):
            raise UsageError(f"rest: true or false, got {self.rest!r}")


class Topk(Form):
    """Softmax with only the largest logits of each row.

    With `rest` the remaining keys keep their exact weight together and stand with the plain mean
    of their values, so a flat head keeps its average; without it the weights of the best sum to
    one. k at least the number of keys is softmax. All logits are computed and ranked exactly (the
    paper finds the best by an index), so nothing is saved: compiled it takes 1.15 to 1.4 times the
    time of exact attention from 1024 to 8192 tokens, and is there to see how few keys a model
    needs. `block_summary` saves the work.
    """

    name = "topk"
    family = "sparse"
    paper = Paper(
        "Mao, Ester, Li",
        "IceFormer: Accelerated Inference with Long-Sequence Transformers on CPUs",
        2024,
        "https://arxiv.org/abs/2405.02842",
    )
    formula = (
        "(sum_top e_j v_j + R mean_rest(v)) / (sum_top e_j + R),  "
        "e_j = exp(scale * q k_j), R = sum_rest e_j"
    )
    Config = TopkConfig

    @property
    def options(self) -> TopkConfig:
        """The config by its own type."""
        assert isinstance(self.config, TopkConfig)
        return self.config

    def applies(self, site: AttentionSite) -> Verdict:
        """Every mask without `rest`; with it causal and padding masks (means need sums)."""
        verdict = linear_verdict(site, self.name) if self.options.rest else group_verdict(site)
        if verdict or verdict.reason not in _BY_REST:
            return verdict
        assert verdict.reason is not None
        return no(
            verdict.reason,
            f"{site.id}: the mean of the keys left over needs a causal or padding mask or none; "
            "use rest=false",
        )

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
        """Attention [B, H, T, E]."""
        weights = self._weights(spec, q, k, key_mask, bias)
        return times_values(weights, v).to(q.dtype)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weights [B, H, T, S]; keys of the remainder share their weight evenly."""
        return self._weights(spec, q, k, key_mask, bias).to(q.dtype)

    def _weights(
        self,
        spec: FormSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        wide = accumulate_dtype(q.dtype)
        soft = Exact().weights(spec, {}, q.to(wide), k.to(wide), key_mask, bias)
        # Softmax weights have the order of the logits but may be 0 for many: rank the logits.
        chosen = self._best(spec, q.to(wide), k.to(wide), key_mask, bias)
        top = soft * chosen
        if not self.options.rest:
            total = top.sum(-1, keepdim=True)
            return top / torch.where(total > 0, total, torch.ones_like(total))
        others = ~chosen & self._seen(spec, q, k, key_mask)
        number = others.sum(-1, keepdim=True).clamp_min(1)
        left = (soft * others).sum(-1, keepdim=True)
        return top + others * (left / number.to(wide))

    def _best(
        self,
        spec: FormSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Which keys are among the best of each query: [B, H, T, S] bool."""
        with torch.no_grad():
            logits = scores(q, k, spec.scale)
            mask = _mask(spec, q, k, key_mask, bias)
            if mask is not None and mask.dtype == torch.bool:
                logits = logits.masked_fill(~mask, -torch.inf)
            elif mask is not None:
                logits = logits + mask
            at = logits.topk(min(self.options.best, logits.shape[-1]), -1).indices
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, at, True)
            return chosen & (logits > -torch.inf)

    def _seen(
        self, spec: FormSpec, q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None
    ) -> torch.Tensor:
        mask = _mask(spec, q, k, key_mask, None)
        if mask is not None:
            return mask
        return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)

    def margin(self, spec: FormSpec, params: Params, q: torch.Tensor, k: torch.Tensor) -> float:
        """The least gap between the last key that counts and the first that does not."""
        some = self.options.best
        if some >= k.shape[2]:
            return float("inf")
        logits = scores(q, k, spec.scale)
        mask = _mask(spec, q, k, None, None)
        logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
        best = logits.topk(some + 1, -1).values
        gap = best[..., -2] - best[..., -1]
        gap = gap[best[..., -2] > -torch.inf]
        return float(gap.min()) if gap.numel() else float("inf")

    def ops(self, site: AttentionSite) -> OpCount:
        """Closed count, k = min(best, S), of bisection and of reading the best values alone.

        (The schedule needs fewer rounds, and multiplies whole rows of weights, which is faster.)

        scale and scores  as exact attention: mul B*H*T*D, mul and add B*H*T*S*D
        bias, masks       add and select B*H*T*S, where there are any
        softmax           max, exp and 2 add for each pair
        the k-th best     31 rounds: add and select 1 and add, select 0 or 1 for each pair (int32)
        the list          2 select and 2 add for each pair (int32)
        values            mul and add B*H*T*k*E, add B*H*T*k; div B*H*T*E
        remainder         select and add for each pair; add B*H*T*(k*E + E + 1), mul B*H*T*E, div
                          and max B*H*T; sums of values and keys add B*G*S*E + B*S
        blind rows        max B*H*T (only where there is a mask or bias)
        """
        b, h, g, t, s, d, e = sizes(site)
        mask, rows, k = site.mask, b * h * t, min(self.options.best, s)
        pairs, rest, dtype = rows * s, int(self.options.rest), count_dtype(site)
        biased = mask.bias or mask.unknown
        hiding = mask.causal or mask.padding or mask.window is not None
        keys = b * g * s * e
        read = rows * d + b * g * s * (d + e) + (pairs if biased else 0)
        floats = OpCount.of(
            dtype,
            mul=pairs * d + rows * (k * e + rest * e) + (rows * d if site.scale != 1.0 else 0),
            add=pairs * (d + 2 + rest + int(biased))
            + rows * (k * e + k + rest * (k * e + e + 1))
            + rest * (keys + b * s),
            select=pairs * (int(hiding) + rest) + (keys if rest and mask.padding else 0),
            max=pairs + rows * (rest + int(hiding or biased)),
            exp=pairs,
            div=rows * (e + rest),
            read=read * item_bytes(site) + (b * s if mask.padding else 0),
            written=rows * e * item_bytes(site),
        )
        search = OpCount.of(
            "int32",
            add=pairs * (ROUNDS + 2) + 3 * ROUNDS * rows,
            select=pairs * (ROUNDS + 2) + 2 * ROUNDS * rows,
            shift=ROUNDS * rows,
        )
        return floats + search

    def counted(self, site: AttentionSite) -> OpCount:
        """By EcoFormer's rule: scores as softmax attention, values of the best alone."""
        b, h, _, t, s, d, e = sizes(site)
        rows, k = b * h * t, min(self.options.best, s)
        return OpCount.of(mul=rows * (s * (d + 1) + k * e), add=rows * (s * d + k * e))

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
        """One kernel."""
        return kit.top_attention(
            q,
            k,
            v,
            best=self.options.best,
            rest=self.options.rest,
            key_mask=key_mask,
            bias=bias,
            causal=spec.causal,
            window=spec.window,
            scale=spec.scale,
        )
