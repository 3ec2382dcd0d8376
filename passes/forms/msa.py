"""msa: softmax attention over all tokens, without a spatial reduction before keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from passes.form import Paper
from passes.forms.exact import Exact
from passes.rewire import ALL_TOKENS
from passes.site import AttentionSite


class Msa(Exact):
    """Softmax attention whose keys and values come from all tokens.

    The reduction that PVT and Segformer put before them (convolution or pooling, norm) is dropped
    and the trained projections read the tokens themselves. It is the first step of EcoFormer's
    recipe; the function changes, so fine-tuning follows. Without a reduction it is `exact`.
    """

    name = "msa"
    family = "exact"
    paper = Paper(
        "Liu, Pan, He, Cai, Zhuang",
        "EcoFormer: Energy-Saving Attention with Linear Complexity",
        2022,
        "https://arxiv.org/abs/2209.09004",
    )
    formula = "softmax(scale * q k^T + bias) v,  k and v from all tokens"
    exact = False
    needs = "training"

    def rewires(self, site: AttentionSite) -> tuple[str, ...]:
        """All tokens, where they are reduced."""
        return (ALL_TOKENS,) if site.reduced else ()

    def spares(self, site: AttentionSite, sites: Sequence[AttentionSite]) -> str:
        """Sites whose keys are not reduced have nothing to take out."""
        return "" if site.reduced else "keys and values already come from all tokens"
