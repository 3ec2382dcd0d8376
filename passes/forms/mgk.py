"""mgk: each key is a mixture of Gaussians around shifted copies of it (Nguyen et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from passes.errors import UsageError
from passes.form import Form, FormConfig, FormSpec, Paper, Params, Verdict
from passes.forms._linear import accumulate_dtype, count_dtype, group_verdict, item_bytes, sizes
from passes.forms._random import gaussian
from passes.forms._rows import times_values
from passes.forms.exact import Exact, _mask
from passes.opcount import OpCount
from passes.site import AttentionSite

SPREAD = 0.1  # of the first shifts: equal Gaussians would stay equal in training


@dataclass(frozen=True)
class MgkConfig(FormConfig):
    """`gaussians` M of each key; `key_norm`: weights times exp(scale |k|^2 / 2).

    With it one Gaussian at the key is softmax, which a trained model needs; the paper is without.
    """

    gaussians: int = 2
    key_norm: bool = True

    def __post_init__(self) -> None:
        m = self.gaussians
        if isinstance(m, bool) or not isinstance(m, int) or not 1 <= m <= 16:
            raise UsageError(f"gaussians: a whole number from 1 to 16, got {m!r}")
        if not isinstance(self.key_norm, bool):
            raise UsageError(f"key_norm: true or false, got {self.key_norm!r}")


class Mgk(Form):
    """Weights sum_r exp(mix_r - scale c_r |q - k - b_r|^2 / 2), over their sum, with every mask.

    `shift` b [G, M, D], `rate` log c [G, M], `mix` [G, M] (log of the mixture's shares up to a
    number) are learned for each key head. They start equal shared, c = 1, the first Gaussian at
    the key itself and the others a little aside. Made so that half the heads do the work of all;
    with as many heads it costs M times the logits.
    """

    name = "mgk"
    family = "exact"
    paper = Paper(
        "Nguyen, Nguyen, Le, Nguyen, Tran, Baraniuk, Ho, Osher",
        "Improving Transformers with Probabilistic Attention Keys",
        2022,
        "https://arxiv.org/abs/2110.08678",
    )
    formula = (
        "sum_j w_ij v_j / sum_j w_ij,  "
        "w_ij = sum_r pi_r exp(-scale c_r |q_i - k_j - b_r|^2 / 2 + bias_ij)"
    )
    trainable = True
    needs = "training"
    Config = MgkConfig

    @property
    def options(self) -> MgkConfig:
        """The config by its own type."""
        assert isinstance(self.config, MgkConfig)
        return self.config

    def applies(self, site: AttentionSite) -> Verdict:
        """Every mask, cross attention and grouped heads, as exact attention."""
        return group_verdict(site)

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """`shift` [G, M, D], `rate` and `mix` [G, M]."""
        d, m = site.dims, self.options.gaussians
        shift = SPREAD * gaussian(d.G * m, d.D, 0).float().reshape(d.G, m, d.D)
        shift[:, 0] = 0.0
        return {"shift": shift, "rate": torch.zeros(d.G, m), "mix": torch.zeros(d.G, m)}

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
        return times_values(self._weights(spec, params, q, k, key_mask, bias), v).to(q.dtype)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weights [B, H, T, S], the Gaussians of a key added up."""
        return self._weights(spec, params, q, k, key_mask, bias).to(q.dtype)

    def _weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        wide, m, keys = accumulate_dtype(q.dtype), self.options.gaussians, k.shape[2]
        q, k = q.to(wide), k.to(wide)
        mask = _mask(spec, q, k, key_mask, bias)
        if mask is not None:
            mask = torch.cat([mask.expand(*mask.shape[:-1], keys)] * m, -1)
        left = torch.cat(
            [q, -0.5 * q.square().sum(-1, keepdim=True), torch.ones_like(q[..., :1])], -1
        )
        right = torch.cat([self._keys(spec, params, k, r) for r in range(m)], 2)
        inner = FormSpec(Exact.name, False, spec.scale)
        each = Exact().weights(inner, {}, left, right, None, mask)
        return each.reshape(*each.shape[:-1], m, keys).sum(-2)

    def _keys(self, spec: FormSpec, params: Params, k: torch.Tensor, r: int) -> torch.Tensor:
        """[c y, c, c (n - |y|^2) / 2 + mix / scale] of Gaussian r: [B, G, S, D + 2]."""
        shift, rate, mix = (params[n].to(k.dtype)[:, r] for n in ("shift", "rate", "mix"))
        c = rate.exp()[:, None, None]
        y = k + shift[:, None]
        size = -0.5 * y.square().sum(-1, keepdim=True)
        if self.options.key_norm:
            size = size + 0.5 * k.square().sum(-1, keepdim=True)
        last = c * size + mix[:, None, None] / spec.scale
        return torch.cat([c * y, c.expand_as(size), last], -1)

    def ops(self, site: AttentionSite) -> OpCount:
        """Queries and keys are made wider, then softmax attention with M keys at each place.

        queries     mul D + 1 and add D each
        keys        for each Gaussian mul 2 D + 2 and add 2 D + 1, with key_norm add 1 more; with it
                    mul D and add D once; exp and mul G*M in all
        attention   as exact with D + 2 channels and M*S keys, but mul and add (M - 1)*B*H*T*S*E
                    less: the weights of a place are added up before they meet its value
        """
        b, h, g, t, s, d, e = sizes(site)
        m, own, size = self.options.gaussians, int(self.options.key_norm), item_bytes(site)
        queries, keys, dtype = b * h * t, b * g * s, count_dtype(site)
        wider = Exact().ops(replace(site, dims=replace(site.dims, D=d + 2, S=m * s)))
        spared = queries * (m - 1) * s * e
        ops = dict(wider.ops)
        ops["mul", dtype] -= spared
        ops["add", dtype] -= spared
        made = OpCount.of(
            dtype,
            mul=queries * (d + 1) + keys * (m * (2 * d + 2) + own * d) + g * m,
            add=queries * d + keys * (m * (2 * d + 1 + own) + own * d),
            exp=g * m,
            read=(queries + keys) * d * size + g * m * (d + 2) * size,
            written=(queries + keys * m) * (d + 2) * size,
        )
        return made + OpCount(ops, wider.bytes_read, wider.bytes_written)

    def counted(self, site: AttentionSite) -> OpCount:
        """By EcoFormer's rule: M times the logits of softmax attention, its values once."""
        b, h, _, t, s, d, e = sizes(site)
        m, pairs = self.options.gaussians, b * h * t * s
        return OpCount.of(mul=pairs * (m * (d + 1) + e), add=pairs * (m * d + e))

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
        """Wider queries and keys, then attention; float32, because lengths are large."""
        dtype, options = kit.dtype(q), self.options
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        shift, rate, mix = (kit.cast(params[n], "float32") for n in ("shift", "rate", "mix"))
        out = kit.mixed_attention(
            kit.extend(q, -0.5, one=True),
            kit.mixture_keys(k, shift, rate, mix, scale=spec.scale, key_norm=options.key_norm),
            v,
            parts=options.gaussians,
            key_mask=key_mask,
            bias=bias,
            causal=spec.causal,
            window=spec.window,
            scale=spec.scale,
        )
        return kit.cast(out, dtype)
