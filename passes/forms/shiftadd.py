"""shiftadd: linear-angular attention over {0, 1} codes (ShiftAddViT, You et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.errors import UsageError
from passes.form import Form, FormConfig, FormSpec, Paper, Params, Reason, Verdict, no
from passes.forms import _hash, _table
from passes.forms._hash_learn import learn, learn_kernel
from passes.forms._linear import (
    accumulate_dtype,
    count_dtype,
    item_bytes,
    linear_verdict,
    sizes,
)
from passes.opcount import OpCount
from passes.rewire import ALL_TOKENS, SHARED
from passes.site import AttentionSite

TAPS = 9  # tokens of the depthwise convolution on the values
TINY = 1e-12
EPS = 1e-6


@dataclass(frozen=True)
class ShiftAddConfig(FormConfig):
    """Options, with the released model's values as defaults.

    `quantiser` "hash" makes codes of `bits` with a kernelised hash of `anchors` (queries and keys
    share one projection where the site allows it), "sign" compares each channel of the
    normalised query and key with a threshold of its head that is frozen (D bits, two projections).
    `product` "linear" is that of the release; "quadratic" weighs every pair by the bits both codes
    have set, by a table of exponentials for each head.
    """

    quantiser: str = "hash"
    bits: int = 16
    anchors: int = 25
    product: str = "linear"

    def __post_init__(self) -> None:
        if self.quantiser not in ("hash", "sign"):
            raise UsageError(f"quantiser: hash or sign, got {self.quantiser!r}")
        if self.product not in ("linear", "quadratic"):
            raise UsageError(f"product: linear or quadratic, got {self.product!r}")
        for name, most in (("bits", 64), ("anchors", 1024)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise UsageError(f"{name}: a whole number from 1 to {most}, got {value!r}")


class ShiftAdd(Form):
    """y = v / 2 + c_q (c_k^T v) / pi; output y / |y| + DW(v), with codes c in {0, 1}.

    The two products are sums of chosen values. Length one takes the place of a denominator, the
    constant term is the query's own value, as released, and DW is a depthwise convolution over
    nine tokens, trained with the model and zero at first. Thresholds are frozen; the release
    takes the mean over the batch. Not made for causal masks or for other tokens as keys.

    With `product` "quadratic" the output is softmax attention over the number of common bits,
    sum_j w[c_q . c_k] v_j / sum_j w[c_q . c_k] + DW(v), without a constant term. The table w
    starts as an exponential and is fitted to the site's attention after the codes.
    """

    name = "shiftadd"
    family = "hashing"
    paper = Paper(
        "You, Shi, Guo, Lin",
        "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer",
        2023,
        "https://arxiv.org/abs/2306.06446",
    )
    formula = "y / |y| + DW(v),  y = v / 2 + c_q (c_k^T v) / pi,  c = 1[u > 0]"
    needs = "training"
    straight_through = True
    weighted = False
    free = frozenset({"conv", "table"})
    Config = ShiftAddConfig

    @property
    def options(self) -> ShiftAddConfig:
        """The config by its own type."""
        assert isinstance(self.config, ShiftAddConfig)
        return self.config

    def applies(self, site: AttentionSite) -> Verdict:
        """Self-attention, with or without padding."""
        verdict, d = linear_verdict(site, self.name), site.dims
        if verdict and site.mask.causal:
            return no(
                Reason.MASK_CAUSAL,
                f"{site.id} is causal; the convolution of {self.name} reads later tokens",
            )
        if verdict and (site.cross or (d.T != d.S and not site.reduced)):
            return no(
                Reason.CROSS,
                f"{site.id} has {d.T} queries and {d.S} keys of other tokens; {self.name} adds "
                "each query's own value",
            )
        return verdict

    def rewires(self, site: AttentionSite) -> tuple[str, ...]:
        """All tokens as keys; with a hash one projection for queries and keys."""
        changes = (ALL_TOKENS,) if site.reduced else ()
        if self.options.quantiser == "hash" and site.dims.H == site.dims.G:
            changes = (*changes, SHARED)
        return changes

    def spares(self, site: AttentionSite, sites: Sequence[AttentionSite]) -> str:
        """The last stage of a pyramid with reduced attention keeps its softmax."""
        return _hash.last_stage(site, sites)

    def init_params(self, site: AttentionSite) -> dict[str, Tensor]:
        """conv [G, 9], the quantiser (a random hash, or threshold [G]), table [H, b + 1]."""
        d, o, bits = site.dims, self.options, self._bits(site)
        made = {"conv": torch.zeros(d.G, TAPS)}
        if self._quadratic:
            step = 2 * site.scale * d.D / bits
            made["table"] = _table.straight_table(d.H, bits, -step * bits, step)
        if o.quantiser == "sign":
            return {**made, "threshold": torch.zeros(d.G)}
        return {**made, **_hash.initial(d.G, d.D, o.anchors, o.bits)}

    @property
    def _quadratic(self) -> bool:
        return self.options.product == "quadratic"

    def learn(
        self,
        site: AttentionSite,
        params: Params,
        samples: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        seed: int = 0,
        warm: bool = False,
    ) -> dict[str, Tensor]:
        """The hash, or each head's threshold: the mean channel of its normalised rows.

        Quadratic: where the hash looks (as `hamming_table`), and the table under the codes.
        """
        known = {n: params[n].detach() for n in params if n in (*_hash.NAMES, "threshold")}
        if self.options.quantiser == "sign":
            found = {"threshold": _hash.mean_channels(samples, site.dims.G)}
        elif self._quadratic:
            found = known if warm else {**known, **learn_kernel(known, samples, seed=seed)}
        else:
            bits = self.options.bits
            found = learn(known, samples, bits, shared=site.shared, seed=seed, warm=warm)
        if not self._quadratic:
            return found

        def count(q: Tensor, k: Tensor) -> Tensor:
            return _table.by_common(self.codes(q, found), self.codes(k, found))

        start = params["table"].detach()
        return {**found, "table": _table.fit_table(site, self.spec(site), start, samples, count)}

    def _projections(self, x: Tensor, params: Params) -> Tensor:
        """u [B, H, N, b], positive where the code is 1."""
        if self.options.quantiser == "hash":
            return _hash.projections(x, params)
        return _hash.above(x, params["threshold"])

    def codes(self, x: Tensor, params: Params) -> Tensor:
        """Codes 0 and 1 [B, H, N, b], with straight-through gradients where 0 < u < 1."""
        return (_hash.signs(self._projections(x, params), 0.0) + 1) / 2

    def margin(self, spec: FormSpec, params: Params, q: Tensor, k: Tensor) -> float:
        """The smallest distance of a projection from its threshold."""
        return _hash.least_margin(*(self._projections(x, params) for x in (q, k)))

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
        """[B, H, T, E] for T = S."""
        cq = self.codes(q, params)
        ck = cq if k is q else self.codes(k, params)
        values = v.to(accumulate_dtype(v.dtype))
        if key_mask is not None:
            values = values.masked_fill(~key_mask[:, None, :, None], 0.0)
        y = self._whole(spec, params, cq, ck, values, key_mask)
        near = _convolve(values, params["conv"].to(values.dtype))
        return (y + near.repeat_interleave(cq.shape[1] // v.shape[1], 1)).to(v.dtype)

    def _whole(
        self,
        spec: FormSpec,
        params: Params,
        cq: Tensor,
        ck: Tensor,
        values: Tensor,
        key_mask: Tensor | None,
    ) -> Tensor:
        """What all keys give, without the convolution: [B, H, T, E]."""
        if self._quadratic:
            common = _table.by_common(cq, ck)
            weights = _table.attention_weights(params["table"], common, spec, key_mask)
            return _table.weighted(weights, values, key_mask)
        batch, heads, tokens, width = cq.shape
        groups = values.shape[1]
        state = ck.mT @ values  # [B, G, b, E]
        read = cq.reshape(batch, groups, -1, width) @ state
        share = heads // groups
        y = read.reshape(batch, heads, tokens, -1) / math.pi
        y = y + values.repeat_interleave(share, 1) / 2
        # The gradient of a square root at zero is infinite: rows of zeros stay what they are.
        square = y.square().sum(-1, keepdim=True)
        return y / square.clamp_min(TINY * TINY).sqrt()

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: Tensor,
        k: Tensor,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The angular similarity 1/2 + c_q c_k / pi of every pair, rows summing to one.

        Only for measuring: the output is not these weights times the values.
        """
        cq, ck = self.codes(q, params), self.codes(k, params)
        if self._quadratic:
            common = _table.by_common(cq, ck)
            return _table.attention_weights(params["table"], common, spec, key_mask).to(q.dtype)
        batch, heads, queries, width = cq.shape
        scores = cq.reshape(batch, ck.shape[1], -1, width) @ ck.mT / math.pi + 0.5
        scores = scores.reshape(batch, heads, queries, -1)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], 0.0)
        return (scores / scores.sum(-1, keepdim=True).clamp_min(EPS)).to(q.dtype)

    def counted(self, site: AttentionSite) -> OpCount:
        """By EcoFormer's rule; rows are B*H*T queries and B*G*S keys.

        hash           add 2*m*D + m*b, mul 2*m + m*b for each hashed row
        sums           add b*E for each key and each query
        per value      own value, 1/pi, nine taps, squares, length: mul 13, add 12
        Quadratic: for each pair add b + E, mul E; nine taps for each value.
        """
        b_, h, g, t, s, d, e = sizes(site)
        m, b = self.options.anchors, self._bits(site)
        queries, keys = b_ * h * t, b_ * g * s
        hashed = queries if site.shared else queries + keys
        if self.options.quantiser == "sign":
            hashed = 0
        if self._quadratic:
            pairs, taps = b_ * h * t * s, TAPS * queries * e
            return OpCount.of(
                mul=hashed * (2 * m + m * b) + pairs * e + taps,
                add=hashed * (2 * m * d + m * b) + pairs * (b + e) + taps,
            )
        return OpCount.of(
            mul=hashed * (2 * m + m * b) + queries * 13 * e,
            add=hashed * (2 * m * d + m * b) + (queries + keys) * b * e + queries * 12 * e,
        )

    def _bits(self, site: AttentionSite) -> int:
        return self.options.bits if self.options.quantiser == "hash" else site.dims.D

    def ops(self, site: AttentionSite) -> OpCount:
        """Codes, then the kernel:

        codes          uint32 shift b for each key and query
        mask           select keys*E (padding)
        state, read    select and add b*E for each key, for each query
        y              mul 2, add 1; length: mul and add 1; output: mul and add 1, for queries*E
        taps           mul and add 9*queries*E
        length         sqrt, max, div queries
        Quadratic: codes, the table (passes/forms/_table.py), taps and their sum.
        """
        b_, h, g, t, s, d, e = sizes(site)
        o, item, b = self.options, item_bytes(site), self._bits(site)
        queries, keys = b_ * h * t, b_ * g * s
        total = OpCount()
        for rows in (queries,) if site.shared else (queries, keys):
            if o.quantiser == "hash":
                total += _hash.hash_ops(rows, g, d, o.anchors, b, item)
            else:
                total += sign_ops(rows, g, d, item)
        if self._quadratic:
            values = queries * e
            near = OpCount.of(mul=TAPS * values, add=(TAPS + 1) * values, read=4 * g * TAPS)
            return total + _table.table_ops(site, b, common=True) + near
        pairs, values = (queries + keys) * b * e, queries * e
        masked = site.mask.padding
        total += OpCount.of("uint32", shift=(queries + keys) * b)
        return total + OpCount.of(
            count_dtype(site),
            select=pairs + keys * e * masked,
            add=pairs + values * (3 + TAPS),
            mul=values * (4 + TAPS),
            sqrt=queries,
            max=queries,
            div=queries,
            read=(queries + keys) * 4 * _hash.words(b)
            + keys * e * item
            + 4 * g * TAPS
            + b_ * s * masked,
            written=values * item,
        )

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
        """Packed codes of q and k, then sums of chosen values."""
        rest = {n: p for n, p in params.items() if n not in ("conv", "table")}
        make = kit.hash_codes if self.options.quantiser == "hash" else kit.sign_codes
        cq = make(q, **rest)
        ck = cq if k is q else make(k, **rest)
        bits = self.options.bits
        if self.options.quantiser == "sign":
            bits = kit.width(q)
        if self._quadratic:
            table, conv = params["table"], params["conv"]
            return kit.table_attention(
                cq, ck, v, table, key_mask=key_mask, conv=conv, causal=False, bits=bits, common=True
            )
        return kit.angular_attention(cq, ck, v, params["conv"], key_mask=key_mask, bits=bits)


def _convolve(v: Tensor, taps: Tensor) -> Tensor:
    """sum_t taps[g, t] v[b, g, i + t - 4, e]: v [B, G, S, E], taps [G, 9]."""
    batch, groups, tokens, width = v.shape
    rows = v.permute(0, 3, 1, 2).reshape(batch * width, groups, tokens)
    out = F.conv1d(rows, taps[:, None], padding=TAPS // 2, groups=groups)
    return out.reshape(batch, width, groups, tokens).permute(0, 2, 3, 1)


def sign_ops(rows: int, groups: int, d: int, item: int) -> OpCount:
    """Comparing the channels of `rows` normalised rows with thresholds, packed into words.

    length         mul and add rows*d; sqrt, max, div rows (its inverse)
    compare        mul rows*d, max rows*d'; uint32: select, shift and add rows*d'
    d' is d, or whole words where a code has several.
    """
    padded = d if d <= 32 else 32 * _hash.words(d)
    count = OpCount.of(
        mul=2 * rows * d, add=rows * d, sqrt=rows, max=rows + rows * padded, div=rows,
        read=rows * d * item + 4 * groups, written=4 * rows * _hash.words(d),
    )  # fmt: skip
    many = rows * padded
    return count + OpCount.of("uint32", select=many, shift=many, add=many)
