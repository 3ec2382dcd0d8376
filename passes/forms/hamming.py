"""hamming: attention over binary codes in Hamming space (EcoFormer, Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passes.decode_form import LinearStreaming
from passes.errors import UsageError
from passes.form import FormConfig, FormSpec, Paper, Params, Reason, Verdict, no
from passes.forms import _hash
from passes.forms._hash_learn import Learning, learn
from passes.forms._linear import (
    accumulate_dtype,
    count_dtype,
    item_bytes,
    linear_attention,
    linear_verdict,
    linear_weights,
    sizes,
)
from passes.opcount import OpCount
from passes.rewire import ALL_TOKENS, SHARED
from passes.site import AttentionSite

EPS = 1e-6
MOST_BITS = 64


@dataclass(frozen=True)
class HammingConfig(FormConfig):
    """Options, with the values of every released EcoFormer model as defaults.

    `bits` b of a code; `anchors` m of the kernel; `beta` is added to the inner product of codes,
    at least b + 1 so that no weight is 0 or less (0 stands for b + 1; a power of two makes the
    product with it a shift). `constant` says what beta multiplies in the numerator: "sum", the sum
    of all values, which is exact, or "own_value", the query's own value, as released models were
    trained. `projection` "shared" gives queries and keys one projection where the site allows it
    (the query's weights), "separate" leaves both. `start` says where the learning of each bit
    begins: "random" numbers, the "spectral" solution of the relaxed problem, or the better of
    "both" (passes/forms/_hash_learn.py compares them).
    """

    bits: int = 16
    anchors: int = 25
    beta: float = 0.0
    constant: str = "sum"
    projection: str = "shared"
    start: str = "random"

    def __post_init__(self) -> None:
        for name, most in (("bits", MOST_BITS), ("anchors", 1024)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise UsageError(f"{name}: a whole number from 1 to {most}, got {value!r}")
        if not isinstance(self.beta, int | float) or not (
            self.beta == 0 or self.bits + 1 <= self.beta < 2**20
        ):
            raise UsageError(
                f"beta: at least bits + 1 = {self.bits + 1}, so that weights are positive, or 0 "
                f"for that; got {self.beta!r}"
            )
        for name, known in (
            ("constant", ("sum", "own_value")),
            ("projection", ("shared", "separate")),
            ("start", ("random", "spectral", "both")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"{name}: {' or '.join(known)}, got {getattr(self, name)!r}")

    @property
    def constant_term(self) -> float:
        """beta, with its default filled in."""
        return float(self.beta or self.bits + 1)


class Hamming(LinearStreaming):
    """Weights b - 2 * Hamming distance + beta of the codes of query and key, in linear time.

    Codes are signs of a kernelised hash (passes/forms/_hash.py) that is learned from the site's
    own activations (`rewriter fit`); before that it is random. With codes s in {-1, 1}^b the
    output is exactly (s_q (S_k^T V) + beta sum V) / (s_q S_k^T 1 + beta N): additions and
    subtractions alone. Causal and padding masks are taken into the sums. On a spatially reduced
    site keys and values come from all tokens. Under a rule for all sites the last stage of a
    pyramid, whose keys were never reduced, keeps its softmax, as in the paper. Dropout on
    attention weights has no counterpart and is ignored.
    """

    name = "hamming"
    family = "hashing"
    paper = Paper(
        "Liu, Pan, He, Cai, Zhuang",
        "EcoFormer: Energy-Saving Attention with Linear Complexity",
        2022,
        "https://arxiv.org/abs/2209.09004",
    )
    formula = (
        "(s_q (s_k^T v) + beta sum(v)) / (s_q sum(s_k) + beta N),  s = sign(mix (K(x) - centre))"
    )
    needs = "training"
    straight_through = True
    eps = EPS
    Config = HammingConfig

    @property
    def options(self) -> HammingConfig:
        """The config by its own type."""
        assert isinstance(self.config, HammingConfig)
        return self.config

    def applies(self, site: AttentionSite) -> Verdict:
        """Causal and padding masks, cross attention; `own_value` needs a value for each query."""
        verdict = linear_verdict(site, self.name)
        d = site.dims
        if verdict and self.options.constant == "own_value" and (site.cross or d.T != d.S):
            return no(
                Reason.CROSS,
                f"{site.id} has {d.T} queries and {d.S} keys of other tokens, and own_value takes "
                'the value at the query; use constant="sum"',
            )
        return verdict

    def rewires(self, site: AttentionSite) -> tuple[str, ...]:
        """All tokens as keys, and one projection for queries and keys, where it can be."""
        d = site.dims
        changes = (ALL_TOKENS,) if site.reduced else ()
        same = site.reduced or d.T == d.S
        if self.options.projection == "shared" and same and d.H == d.G and not site.cross:
            changes = (*changes, SHARED)
        return changes

    def spares(self, site: AttentionSite, sites: Sequence[AttentionSite]) -> str:
        """The last stage of a pyramid with reduced attention keeps its softmax."""
        return _hash.last_stage(site, sites)

    def init_params(self, site: AttentionSite) -> dict[str, Tensor]:
        """A random hash for each key head: anchors, centre, mix, rate."""
        o = self.options
        return _hash.initial(site.dims.G, site.dims.D, o.anchors, o.bits)

    def learn(
        self,
        site: AttentionSite,
        params: Params,
        samples: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        seed: int = 0,
        warm: bool = False,
    ) -> dict[str, Tensor]:
        """The hash of passes/forms/_hash_learn.py."""
        how, bits = Learning(start=self.options.start), self.options.bits
        return learn(params, samples, bits, shared=site.shared, seed=seed, warm=warm, how=how)

    def codes(self, x: Tensor, params: Params) -> Tensor:
        """Codes -1 and 1 [B, H, N, b] of rows x [B, H, N, D], with straight-through gradients."""
        return _hash.signs(_hash.projections(x, params))

    def margin(self, spec: FormSpec, params: Params, q: Tensor, k: Tensor) -> float:
        """The smallest distance of a projection from its threshold."""
        return _hash.least_margin(_hash.projections(q, params), _hash.projections(k, params))

    def features(
        self, spec: FormSpec, params: Params, q: Tensor, k: Tensor
    ) -> tuple[Tensor, Tensor]:
        """([s_q, beta], [s_k, 1]), whose inner product is the weight before normalising."""
        sq = self.codes(q, params)
        sk = sq if k is q else self.codes(k, params)
        beta = self.options.constant_term
        return _with(sq, beta), _with(sk, 1.0)

    def width(self, site: AttentionSite) -> int:
        """b + 1."""
        return self.options.bits + 1

    def streams(self, site: AttentionSite) -> Verdict:
        """As the linear forms; a step has no term of a query's `own_value`."""
        if self.options.constant == "own_value":
            return no(
                Reason.CROSS,
                f'own_value is not computed token by token; use constant="sum" at {site.id}',
            )
        return super().streams(site)

    def map_kernels(
        self, kit: Any, spec: FormSpec, params: Mapping[str, Any], q: Any, k: Any
    ) -> tuple[Any, Any]:
        """Codes, then `features` of them."""
        o = self.options
        cq = kit.hash_codes(q, **params)
        ck = cq if k is q else kit.hash_codes(k, **params)
        return kit.code_signs(cq, o.bits, o.constant_term), kit.code_signs(ck, o.bits, 1.0)

    def attend(
        self,
        spec: FormSpec,
        params: Params,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Linear attention [B, H, T, E] over codes."""
        fq, fk = self.features(spec, params, q, k)
        values = v.to(accumulate_dtype(v.dtype))
        out = linear_attention(fq, fk, values, key_mask=key_mask, causal=spec.causal, eps=EPS)
        if self.options.constant == "own_value":
            out = out + self._own(spec, fq, fk, values, key_mask)
        return out.to(v.dtype)

    def _own(
        self, spec: FormSpec, fq: Tensor, fk: Tensor, v: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        """beta (v_i - sum of visible v) / denominator: from the exact form to `own_value`."""
        seen = torch.ones_like(v[..., :1])
        if key_mask is not None:
            seen = seen * key_mask[:, None, :, None]
        values, keys = v * seen, fk * seen
        if spec.causal:
            total, z = values.cumsum(-2), keys.cumsum(-2)
        else:
            total, z = values.sum(-2, keepdim=True), keys.sum(-2, keepdim=True)
        share = fq.shape[1] // v.shape[1]
        total, z, own = (x.repeat_interleave(share, 1) for x in (total, z, values))
        bottom = (fq * z).sum(-1, keepdim=True).clamp_min(EPS)
        return self.options.constant_term * (own - total) / bottom

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: Tensor,
        k: Tensor,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Weights [B, H, T, S] of the exact form (`constant` "sum"); quadratic."""
        fq, fk = self.features(spec, params, q, k)
        return linear_weights(fq, fk, spec, key_mask, EPS).to(q.dtype)

    def counted(self, site: AttentionSite) -> OpCount:
        """EcoFormer's rule (released counter); rows are B*H*T queries and B*G*S keys.

        kernel         add 2*m*D, mul 2*m for each hashed row (the squares are free)
        bits           mul and add m*b for each hashed row
        sums           add b + b*E for each key; add b + b*E + E, mul b + 1 + E for each query
        With a shared projection rows are hashed once. exp, lengths and memory are free.
        """
        b_, h, g, t, s, d, e = sizes(site)
        m, b = self.options.anchors, self.options.bits
        queries, keys = b_ * h * t, b_ * g * s
        hashed = queries if site.shared else queries + keys
        return OpCount.of(
            mul=hashed * (2 * m + m * b) + queries * (b + 1 + e),
            add=hashed * (2 * m * d + m * b) + keys * (b + b * e) + queries * (b + b * e + e),
        )

    def ops(self, site: AttentionSite) -> OpCount:
        """Hash the queries, the keys (unless shared), then the sums over signed values."""
        b_, h, g, t, s, d, _ = sizes(site)
        o, item = self.options, item_bytes(site)
        total = _hash.hash_ops(b_ * h * t, g, d, o.anchors, o.bits, item)
        if not site.shared:
            total += _hash.hash_ops(b_ * g * s, g, d, o.anchors, o.bits, item)
        return total + signed_sums_ops(site, o.bits, own=o.constant == "own_value")

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
        """Packed codes of q and k, then sums of values with the sign of each bit."""
        o = self.options
        cq = kit.hash_codes(q, **params)
        ck = cq if k is q else kit.hash_codes(k, **params)
        return kit.hamming_attention(
            cq,
            ck,
            v,
            key_mask=key_mask,
            causal=spec.causal,
            bits=o.bits,
            beta=o.constant_term,
            own=o.constant == "own_value",
            eps=EPS,
        )


def _with(codes: Tensor, value: float) -> Tensor:
    """Codes with one more column of `value`."""
    return torch.cat([codes, codes.new_full((*codes.shape[:-1], 1), value)], -1)


def signed_sums_ops(site: AttentionSite, bits: int, *, own: bool) -> OpCount:
    """The sums over packed codes; keys = B*G*S, queries = B*H*T (causal: those that see a key).

    signs          uint32 shift 2*b for each key and query
    mask           select keys*E (padding)
    state          uint32 xor and float add b*(E + 1) for each key (the last column counts)
    all values     add keys*E                                   (constant "sum")
    number seen    add S for each row of the key mask; causal: add keys
    read           uint32 xor and float add b*(E + 1) for each query
    constant       mul B*G*E (own_value, causal: queries*E); mul rows of the mask (causal: queries)
    denominator    add and max for each query
    output         add and div queries*E
    """
    b_, h, g, t, s, _, e = sizes(site)
    masked, causal = site.mask.padding, site.mask.causal
    keys, queries = b_ * g * s, b_ * h * (min(t, s) if causal else t)
    pairs = (keys + queries) * bits * (e + 1)
    mul = queries * (e + 1) if causal else (queries if own else b_ * g) * e + b_ * masked
    add = pairs + queries * (e + 1) + (0 if own else keys * e)
    add += keys if causal else b_ * s * masked
    word = 4 * _hash.words(bits)
    count = OpCount.of(
        count_dtype(site),
        mul=mul,
        add=add,
        max=queries,
        div=queries * e,
        select=keys * e * masked,
        read=(b_ * h * t + keys) * word + keys * e * item_bytes(site) + b_ * s * masked,
        written=b_ * h * t * e * item_bytes(site),
    )
    shifts = 2 * bits * (b_ * h * t + keys)
    return count + OpCount.of("uint32", shift=shifts, xor=pairs)
