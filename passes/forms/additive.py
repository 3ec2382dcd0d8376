"""additive: two pooled vectors in place of pairs of tokens (Fastformer, Wu et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from passes.form import Form, FormSpec, Paper, Params, Reason, Verdict, no
from passes.forms._linear import (
    accumulate_dtype,
    count_dtype,
    item_bytes,
    linear_verdict,
    project_ops,
    sizes,
)
from passes.forms._random import gaussian
from passes.forms.exact import Exact
from passes.opcount import OpCount
from passes.site import AttentionSite, Mask

SPREAD = 0.02  # of the first weights, as published


class Additive(Form):
    """q_i + (g_k * v_i) M, with g_q and g_k pooled from all queries and all keys.

    g_q is the mean of the queries under softmax_i(scale w_q.q_i), g_k that of the g_q * k_i under
    softmax_i(scale w_k.(g_q * k_i)); * goes channel by channel. `w_q`, `w_k` [H, D] and M, `mix`
    [H, D, D], are learned (in the paper M mixes all heads). Tokens meet in two vectors only, so no
    query can choose its keys: for models that are trained with it. Linear in the tokens. What a
    hidden token holds does not count.
    """

    name = "additive"
    family = "kernelised"
    paper = Paper(
        "Wu, Wu, Qi, Huang, Xie",
        "Fastformer: Additive Attention Can Be All You Need",
        2021,
        "https://arxiv.org/abs/2108.09084",
    )
    formula = (
        "q_i + (g_k * v_i) M,  g_q = sum softmax(s w_q.q_i) q_i,  "
        "g_k = sum softmax(s w_k.(g_q * k_i)) g_q * k_i"
    )
    trainable = True
    needs = "training"
    weighted = False

    def applies(self, site: AttentionSite) -> Verdict:
        """Padding masks and grouped heads; the same tokens as queries and keys, D = E."""
        d = site.dims
        if site.mask.causal:
            return no(
                Reason.MASK_CAUSAL,
                f"{site.id} is causal; the pooled vectors of {self.name} are means over all tokens",
            )
        if site.cross or site.reduced or d.T != d.S:
            return no(
                Reason.CROSS,
                f"{site.id}: queries and keys are not the same tokens; {self.name} adds the query "
                "of a token to the value of the same",
            )
        if d.D != d.E:
            return no(
                Reason.HEAD_DIM,
                f"{site.id}: keys of width {d.D} can not scale values of width {d.E} channel by "
                "channel",
            )
        return linear_verdict(site, self.name)

    def init_params(self, site: AttentionSite) -> dict[str, torch.Tensor]:
        """`w_q`, `w_k` [H, D], `mix` [H, D, D]: small random numbers, and identities."""
        h, d = site.dims.H, site.dims.D
        w_q, w_k = (SPREAD * gaussian(h, d, seed).float() for seed in (0, 1))
        return {"w_q": w_q, "w_k": w_k, "mix": torch.eye(d).repeat(h, 1, 1)}

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
        """[B, H, T, D]; 0 in a sample where no token is visible."""
        wide, group = accumulate_dtype(q.dtype), q.shape[1] // k.shape[1]
        rows = q.to(wide)
        values = v.to(wide).repeat_interleave(group, 1)
        if key_mask is not None:
            values = values.masked_fill(~key_mask[:, None, :, None], 0.0)
            rows = rows * key_mask.any(-1)[:, None, None, None]
        shares, products = self._shares(spec, params, q, k, key_mask)
        pooled = shares @ products  # [B, H, 1, D]
        return ((pooled * values) @ params["mix"].to(wide) + rows).to(q.dtype)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What each token is of g_k [B, H, T, S], the same for all queries."""
        shares = self._shares(spec, params, q, k, key_mask)[0]
        return shares.expand(-1, -1, q.shape[2], -1).to(q.dtype)

    def _shares(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what each token is of g_k [B, H, 1, T], the products g_q * k_i [B, H, T, D])."""
        wide, inner = accumulate_dtype(q.dtype), FormSpec(Exact.name, False, spec.scale)
        q, k = q.to(wide), k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
        if key_mask is not None:
            hidden = ~key_mask[:, None, :, None]
            q, k = q.masked_fill(hidden, 0.0), k.masked_fill(hidden, 0.0)
        w_q, w_k = (params[n].to(wide)[None, :, None].expand(q.shape[0], -1, -1, -1)
                    for n in ("w_q", "w_k"))  # fmt: skip
        products = (Exact().weights(inner, {}, w_q, q, key_mask) @ q) * k
        return Exact().weights(inner, {}, w_k, products, key_mask), products

    def ops(self, site: AttentionSite) -> OpCount:
        """Two exact attentions of one query a head, and what is done to each token.

        pooling    exact attention of 1 query and T keys of H heads, and of G; with a mask the
                   first has D + 1 channels of values
        vectors    mul 2 B*H*D
        tokens     mul B*H*T*D; with a mask select and mul as many more
        matrix     mul and add B*H*T*D*D; add B*H*T*D
        """
        b, h, g, t, _, d, _ = sizes(site)
        masked, size, one = site.mask.padding, item_bytes(site), b * h * t * d
        mask = Mask(padding=masked)
        first = replace(site, dims=replace(site.dims, T=1, G=h, E=d + int(masked)), mask=mask)
        second = replace(site, dims=replace(site.dims, T=1), mask=mask)
        per_token = OpCount.of(
            count_dtype(site),
            mul=2 * b * h * d + one + (one if masked else 0),
            select=one if masked else 0,
            add=one,
            read=(2 * one + b * g * t * d + 4 * b * h * d + b * h * d) * size,
            written=(2 * b * h * d + 2 * one) * size,
        )
        matrix = project_ops(b * h * t, h, d, d, scaled=False, site=site)
        return Exact().ops(first) + Exact().ops(second) + per_token + matrix

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
        """Two attentions of one query, channels scaled, the matrix, the query added."""
        dtype, batch = kit.dtype(q), kit.batch(q)
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        w_q, w_k, mix = (kit.cast(params[n], "float32") for n in ("w_q", "w_k", "mix"))
        ask_q, ask_k = (kit.one_query(w, batch) for w in (w_q, w_k))
        held = q if key_mask is None else kit.with_ones(q)
        pooled = kit.exact_attention(ask_q, q, held, key_mask=key_mask, scale=spec.scale)
        some = None
        if key_mask is not None:
            pooled, some = kit.without_last(pooled)
        keys = kit.scale_channels(ask_k, pooled)
        near = kit.exact_attention(keys, k, k, key_mask=key_mask, scale=spec.scale)
        scaled = kit.scale_channels(v, kit.scale_channels(near, pooled), key_mask)
        out = kit.add_rows(kit.project(scaled, mix), q, some)
        return kit.cast(out, dtype)
