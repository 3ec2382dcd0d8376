"""diag_block: softmax attention inside blocks of neighbouring tokens (Qin et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from passes.errors import FormError, UsageError
from passes.form import Form, FormConfig, FormSpec, Paper, Params, Reason, Verdict, no
from passes.forms._linear import linear_verdict, sizes
from passes.forms.exact import Exact
from passes.opcount import OpCount
from passes.site import AttentionSite, Dims


@dataclass(frozen=True)
class DiagBlockConfig(FormConfig):
    """`block`: tokens of a block."""

    block: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1:
            raise UsageError(f"block: a whole number from 1, got {self.block}")


class DiagBlock(Form):
    """Tokens are cut into blocks; each attends to its own block by softmax, to no other.

    Equals softmax with a block diagonal mask, in time linear in the tokens. TransNormer has it in
    the early layers, where attention is local, and `norm_linear` in the later ones. A query whose
    whole block is hidden by the key mask gives 0. Dropout on weights is ignored.
    """

    name = "diag_block"
    family = "sparse"
    paper = Paper(
        "Qin, Han, Sun, Li, Kong, Barnes, Zhong",
        "The Devil in Linear Transformer",
        2022,
        "https://arxiv.org/abs/2210.10340",
    )
    formula = "softmax(scale * q k^T + mask) v,  mask hides keys of other blocks"
    needs = "training"
    local = True
    Config = DiagBlockConfig

    @property
    def _block(self) -> int:
        assert isinstance(self.config, DiagBlockConfig)
        return self.config.block

    def applies(self, site: AttentionSite) -> Verdict:
        """Causal and padding masks, grouped heads; queries and keys must be the same tokens."""
        if site.cross or site.dims.T != site.dims.S:
            return no(
                Reason.CROSS,
                f"{site.id}: queries and keys are not the same tokens, so they share no blocks",
            )
        return linear_verdict(site, self.name)

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
        """Softmax attention per block [B, H, T, E]; FormError if T is not S."""
        batch, _, tokens, _ = q.shape
        if k.shape[2] != tokens:
            raise FormError(f"diag_block got {tokens} queries and {k.shape[2]} keys")
        size = max(min(self._block, tokens), 1)
        number = -(-tokens // size)
        fill = number * size - tokens
        hidden = None
        if key_mask is not None or fill:
            mask = key_mask
            if mask is None:
                mask = torch.ones(1, tokens, dtype=torch.bool, device=q.device)
            mask = torch.nn.functional.pad(mask, (0, fill)).expand(batch, -1)
            hidden = mask.reshape(batch * number, size)
        q_, k_, v_ = (self._cut(x, number, size, fill) for x in (q, k, v))
        inner = FormSpec(Exact.name, spec.causal, spec.scale)
        out = Exact().attend(inner, {}, q_, k_, v_, hidden)
        out = out.reshape(batch, number, q.shape[1], size, -1).transpose(1, 2).flatten(2, 3)
        return out[:, :, :tokens]

    def _cut(self, x: torch.Tensor, number: int, size: int, fill: int) -> torch.Tensor:
        """[B, H, T, D] -> [B * number, H, size, D]."""
        x = torch.nn.functional.pad(x, (0, 0, 0, fill))
        x = x.reshape(*x.shape[:2], number, size, x.shape[3])
        return x.transpose(1, 2).flatten(0, 1)

    def weights(
        self,
        spec: FormSpec,
        params: Params,
        q: torch.Tensor,
        k: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weights [B, H, T, S], 0 outside the blocks."""
        block = torch.arange(q.shape[2], device=q.device) // self._block
        inner = FormSpec(Exact.name, spec.causal, spec.scale)
        return Exact().weights(inner, {}, q, k, key_mask, block[:, None] == block)

    def ops(self, site: AttentionSite) -> OpCount:
        """Exact attention of the blocks; the last one is filled up with hidden keys."""
        b, h, _, t, _, d, e = sizes(site)
        size = min(self._block, t)
        number = -(-t // size)
        dims = Dims(b * h * number, 1, 1, size, size, d, e)
        padding = site.mask.padding or number * size != t
        return Exact().ops(replace(site, dims=dims, mask=replace(site.mask, padding=padding)))

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
        """Exact attention with blocks as batch."""
        return kit.block_attention(
            q, k, v, key_mask=key_mask, causal=spec.causal, scale=spec.scale, block=self._block
        )
