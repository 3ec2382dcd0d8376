"""hamming_table: softmax attention with weights looked up by the Hamming distance of codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, zeros

from passes.errors import UsageError
from passes.form import Form, FormConfig, FormSpec, Paper, Params, Verdict
from passes.forms import _hash, _table
from passes.forms._hash_learn import learn_kernel
from passes.forms._linear import accumulate_dtype, item_bytes, linear_verdict, sizes
from passes.forms.shiftadd import sign_ops
from passes.opcount import OpCount
from passes.site import AttentionSite


@dataclass(frozen=True)
class HammingTableConfig(FormConfig):
    """Options. `quantiser` "hash" makes codes of `bits` with a kernelised hash of `anchors`;
    "sign" compares each channel of the normalised query and key with a threshold of its head
    (D bits)."""

    quantiser: str = "hash"
    bits: int = 32
    anchors: int = 25

    def __post_init__(self) -> None:
        if self.quantiser not in ("hash", "sign"):
            raise UsageError(f"quantiser: hash or sign, got {self.quantiser!r}")
        for name, most in (("bits", 64), ("anchors", 1024)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise UsageError(f"{name}: a whole number from 1 to {most}, got {value!r}")


class HammingTable(Form):
    """Weights by Hamming distance, one table a head, in quadratic time.

    The codes are a kernelised hash as in `hamming` (or plain signs, as in the paper); the weight
    of a pair is entry popcount(q xor k) of the head's table, normalised over the keys a query
    sees. The table starts as exp(scale * (b - 2 distance)), as if queries and keys had length
    sqrt(D). `rewriter fit` takes the hash's anchors, bandwidth and centres from the site's own
    queries and keys (its mixing stays random: mixings learned as for `hamming` gave larger errors)
    and fits the table to the site's attention by maximum likelihood. The paper's choice of the N
    largest weights is not made. Causal and padding masks; dropout on attention weights is ignored.
    """

    name = "hamming_table"
    family = "hashing"
    paper = Paper(
        "Horton, Molom-Ochir, Liu, Gopal, Wei, Guo, Taylor, Fan, Wang, Li, Chen",
        "Hamming Attention Distillation: Binarizing Keys and Queries for Efficient Long-Context "
        "Transformers",
        2025,
        "https://arxiv.org/abs/2502.01770",
    )
    formula = "sum_j w[d_ij] v_j / sum_j w[d_ij],  d_ij = popcount(q_i xor k_j)"
    needs = "short fit"
    straight_through = True
    free = frozenset({"table"})
    Config = HammingTableConfig

    @property
    def options(self) -> HammingTableConfig:
        """The config by its own type."""
        assert isinstance(self.config, HammingTableConfig)
        return self.config

    def applies(self, site: AttentionSite) -> Verdict:
        """Causal and padding masks, cross attention, grouped heads."""
        return linear_verdict(site, self.name)

    def init_params(self, site: AttentionSite) -> dict[str, Tensor]:
        """table [H, b + 1] (logarithms) and the quantiser: a random hash, or threshold [G]."""
        d, o, bits = site.dims, self.options, self._bits(site)
        step = site.scale * d.D / bits
        table = _table.straight_table(d.H, bits, 0.0, -2 * step)
        if o.quantiser == "sign":
            return {"table": table, "threshold": zeros(d.G)}
        return {"table": table, **_hash.initial(d.G, d.D, o.anchors, o.bits)}

    def _bits(self, site: AttentionSite) -> int:
        return self.options.bits if self.options.quantiser == "hash" else site.dims.D

    def learn(
        self,
        site: AttentionSite,
        params: Params,
        samples: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        seed: int = 0,
        warm: bool = False,
    ) -> dict[str, Tensor]:
        """Where the hash looks (or the thresholds), then the table under its codes.

        A refresh (`warm`) leaves the codes and fits the table anew.
        """
        found = {n: p.detach() for n, p in params.items() if n != "table"}
        if not warm and self.options.quantiser == "hash":
            found |= learn_kernel(found, samples, seed=seed)
        elif not warm:
            found = {"threshold": _hash.mean_channels(samples, site.dims.G)}

        def count(q: Tensor, k: Tensor) -> Tensor:
            return _table.by_distance(self.codes(q, found), self.codes(k, found))

        start = params["table"].detach()
        return {**found, "table": _table.fit_table(site, self.spec(site), start, samples, count)}

    def codes(self, x: Tensor, params: Params) -> Tensor:
        """Codes -1 and 1 [B, H, N, b], with straight-through gradients."""
        return _hash.signs(self._projections(x, params))

    def _projections(self, x: Tensor, params: Params) -> Tensor:
        if self.options.quantiser == "hash":
            return _hash.projections(x, params)
        return _hash.above(x, params["threshold"])

    def margin(self, spec: FormSpec, params: Params, q: Tensor, k: Tensor) -> float:
        """The smallest distance of a projection from its threshold."""
        return _hash.least_margin(*(self._projections(x, params) for x in (q, k)))

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: Tensor,
        k: Tensor,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Weights [B, H, T, S] of the distances; rows sum to one."""
        found = self._weights(spec, params, q, k, key_mask)
        return found.to(q.dtype)

    def _weights(
        self, spec: FormSpec, params: Params, q: Tensor, k: Tensor, key_mask: Tensor | None
    ) -> Tensor:
        distance = _table.by_distance(self.codes(q, params), self.codes(k, params))
        return _table.attention_weights(params["table"], distance, spec, key_mask)

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
        """[B, H, T, E]."""
        weights = self._weights(spec, params, q, k, key_mask)
        return _table.weighted(weights, v.to(accumulate_dtype(v.dtype)), key_mask).to(v.dtype)

    def ops(self, site: AttentionSite) -> OpCount:
        """Codes of the queries and of the keys, then the sums by the table."""
        b_, h, g, t, s, d, _ = sizes(site)
        o, item = self.options, item_bytes(site)
        total = _table.table_ops(site, self._bits(site))
        for rows in (b_ * h * t, b_ * g * s):
            if o.quantiser == "hash":
                total += _hash.hash_ops(rows, g, d, o.anchors, o.bits, item)
            else:
                total += sign_ops(rows, g, d, item)
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
        """Packed codes of q and k, then one look-up for each pair."""
        rest = {n: p for n, p in params.items() if n != "table"}
        hashed = self.options.quantiser == "hash"
        cq, ck = ((kit.hash_codes if hashed else kit.sign_codes)(x, **rest) for x in (q, k))
        return kit.table_attention(
            cq,
            ck,
            v,
            params["table"],
            key_mask=key_mask,
            causal=spec.causal,
            bits=self.options.bits if hashed else kit.width(q),
        )
