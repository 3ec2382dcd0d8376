"""block_summary: the nearest and best blocks of keys one by one, the others by their means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from passes.errors import FormError, UsageError
from passes.form import Form, FormConfig, FormSpec, Paper, Params, Reason, Verdict, no
from passes.forms._landmarks import landmark_verdict, segment_ops
from passes.forms._linear import accumulate_dtype, count_dtype, item_bytes, sizes
from passes.forms._rows import scores, times_values
from passes.forms.exact import Exact
from passes.opcount import OpCount
from passes.site import AttentionSite, Dims, Mask


@dataclass(frozen=True)
class BlockSummaryConfig(FormConfig):
    """`block` C: tokens of a block; `best`: blocks seen key by key besides a query's own."""

    block: int = 16
    best: int = 3

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("best", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name}: a whole number from {least}, got {value!r}")


class BlockSummary(Form):
    """Softmax over the keys of some blocks and, for every other block, its mean with its size.

    A block of queries sees its own block and the `best` ones by its mean query key by key; any
    other counts as its visible keys would if all were at their mean: exp(scale q.mean) times their
    number, with the mean of their values. No key is lost, so flat heads keep their average, and
    all blocks give softmax, which is also computed where that is cheaper. Cost per query
    (best + 1) C + T / C keys. Combiner adds such means to local attention; choosing the best
    blocks is this project's.
    """

    name = "block_summary"
    family = "sparse"
    paper = Paper(
        "Ren, Dai, Dai, Yang, Leskovec, Schuurmans, Dai",
        "Combiner: Full Attention Transformer with Sparse Computation Cost",
        2021,
        "https://arxiv.org/abs/2107.05768",
    )
    formula = (
        "(sum_near e_ij v_j + sum_far n_b e_ib mean_b(v)) / (sum_near e_ij + sum_far n_b e_ib),  "
        "e_ib = exp(scale q_i mean_b(k))"
    )
    Config = BlockSummaryConfig

    @property
    def options(self) -> BlockSummaryConfig:
        """The config by its own type."""
        assert isinstance(self.config, BlockSummaryConfig)
        return self.config

    def applies(self, site: AttentionSite) -> Verdict:
        """Padding masks and grouped heads; queries and keys are the same tokens, nothing causal."""
        if site.cross or site.reduced or site.dims.T != site.dims.S:
            return no(
                Reason.CROSS,
                f"{site.id}: queries and keys are not the same tokens, so they share no blocks",
            )
        return landmark_verdict(site, self.name)

    def blocks(self, tokens: int) -> int:
        """N, the number of blocks."""
        return -(-tokens // self.options.block)

    def dense(self, tokens: int) -> bool:
        """Whether every block would be seen key by key."""
        return self.blocks(tokens) <= self.options.best + 1

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
        """Attention [B, H, T, E]; FormError if T is not S."""
        if q.shape[2] != k.shape[2]:
            raise FormError(f"{self.name} got {q.shape[2]} queries and {k.shape[2]} keys")
        if self.dense(q.shape[2]):
            return Exact().attend(spec, {}, q, k, v, key_mask)
        return times_values(self._weights(spec, q, k, key_mask), v).to(q.dtype)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weights [B, H, T, S]; the visible keys of a far block share its weight evenly."""
        if self.dense(q.shape[2]):
            return Exact().weights(spec, {}, q, k, key_mask)
        return self._weights(spec, q, k, key_mask).to(q.dtype)

    def _weights(
        self, spec: FormSpec, q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None
    ) -> torch.Tensor:
        wide, tokens = accumulate_dtype(q.dtype), q.shape[2]
        q, k = q.to(wide), k.to(wide)
        share = self._share(tokens, key_mask, q)
        means = share[:, None] @ k
        near = self._chosen(spec, share[:, None] @ q, means, share)
        block = torch.arange(tokens, device=q.device) // self.options.block
        near = near[:, :, block]  # [B, H, T, N]
        seen = near[..., block]
        if key_mask is not None:
            seen = seen & key_mask[:, None, None]
        number = (share > 0).sum(-1)
        lengths = torch.where(number > 0, number, 1).to(wide).log()[:, None, None]
        far = ~near & (number > 0)[:, None, None]
        added = torch.cat(
            [
                torch.zeros_like(q[..., :1]).expand(seen.shape).masked_fill(~seen, -torch.inf),
                lengths.expand(far.shape).masked_fill(~far, -torch.inf),
            ],
            -1,
        )
        inner = FormSpec(Exact.name, False, spec.scale)
        each = Exact().weights(inner, {}, q, torch.cat([k, means], 2), None, added)
        return each[..., :tokens] + each[..., tokens:] @ share[:, None]

    def _share(
        self, tokens: int, key_mask: torch.Tensor | None, like: torch.Tensor
    ) -> torch.Tensor:
        """What each token is of its block's mean [B or 1, N, S]; 0 for a block without any."""
        block = torch.arange(tokens, device=like.device) // self.options.block
        numbers = torch.arange(self.blocks(tokens), device=like.device)
        inside = (block == numbers[:, None])[None]
        if key_mask is not None:
            inside = inside & key_mask[:, None]
        return inside.to(like.dtype) / inside.sum(-1, keepdim=True).clamp_min(1)

    def _scores(
        self, spec: FormSpec, q: torch.Tensor, k: torch.Tensor, share: torch.Tensor
    ) -> torch.Tensor:
        """How well a block of queries would do with each block of keys: [B, H, N, N]."""
        number = (share > 0).sum(-1)
        lengths = number.to(q.dtype).log()[:, None, None]  # log 0 is -inf
        own = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
        return (scores(q, k, spec.scale) + lengths).masked_fill(own, -torch.inf)

    def _chosen(
        self, spec: FormSpec, q: torch.Tensor, k: torch.Tensor, share: torch.Tensor
    ) -> torch.Tensor:
        """Which blocks of keys each block of queries sees key by key: [B, H, N, N] bool."""
        with torch.no_grad():
            score = self._scores(spec, q, k, share)
            at = score.topk(self.options.best, -1).indices
            chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, at, True)
            chosen = chosen & (score > -torch.inf)
            return chosen | torch.eye(q.shape[2], dtype=torch.bool, device=q.device)

    def margin(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
    ) -> float:
        """The least gap between the last block that is chosen and the first that is not."""
        if self.dense(q.shape[2]) or not self.options.best:
            return float("inf")
        share = self._share(q.shape[2], key_mask, q)[:, None]
        score = self._scores(spec, share @ q, share @ k, share[:, 0])
        best = score.topk(self.options.best + 1, -1).values
        gap = (best[..., -2] - best[..., -1])[best[..., -1] > -torch.inf]
        return float(gap.min()) if gap.numel() else float("inf")

    def ops(self, site: AttentionSite) -> OpCount:
        """Means of queries, keys and values, the choice, exact attention of the gathered keys.

        counts     with a mask: add B*T' (T' = N C), log, 2 max and select B*N
        choice     mul B*H*N*N*(D + 1), add as many; for each of `best` 2 max and select B*H*N*N
        attention  exact attention of B*H*N blocks of C queries with (best + 1) C + N keys and bias
        """
        b, h, g, t, _, d, e = sizes(site)
        if self.dense(t):
            return Exact().ops(site)
        n, c, best, size = self.blocks(t), self.options.block, self.options.best, item_bytes(site)
        rows, length, dtype = b if site.mask.padding else 0, (best + 1) * c + n, count_dtype(site)
        tasks, pairs = b * h * n, b * h * n * n
        total = OpCount()
        for heads, width in ((h, d), (g, d), (g, e)):
            total += segment_ops(b, heads, t, width, n, site, mask_rows=rows)
        total += OpCount.of(
            dtype,
            mul=pairs * (d + 1),
            add=pairs * (d + 1) + rows * n * c,
            max=2 * best * pairs + 2 * rows * n,
            select=rows * n,
            log=rows * n,
            read=2 * pairs * d * size,
            written=(tasks * length * (d + e + 1) + rows * n) * size + tasks * (best + 1) * 4,
        )
        total += OpCount.of("int32", select=best * pairs)
        inner = replace(site, dims=Dims(tasks, 1, 1, c, length, d, e), mask=Mask(bias=True))
        return total + Exact().ops(inner)

    def counted(self, site: AttentionSite) -> OpCount:
        """EcoFormer's rule for softmax attention of the gathered keys, and the choice."""
        b, h, _, t, _, d, e = sizes(site)
        if self.dense(t):
            return Exact().counted(site)
        n = self.blocks(t)
        dims = Dims(b, h, h, t, (self.options.best + 1) * self.options.block + n, d, e)
        choice = OpCount.of(mul=b * h * n * n * d, add=b * h * n * n * d)
        return Exact().counted(replace(site, dims=dims)) + choice

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
        """Means, choice, gathering, exact attention with blocks of queries as batch."""
        if self.dense(kit.tokens(q)):
            return Exact().kernel(kit, spec, {}, q, k, v, key_mask)
        dtype, o = kit.dtype(q), self.options
        q, k, v = (kit.cast(x, "float32") for x in (q, k, v))
        out = kit.chosen_blocks(
            q, k, v, key_mask=key_mask, scale=spec.scale, block=o.block, best=o.best
        )
        return kit.cast(out, dtype)
