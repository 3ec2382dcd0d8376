"""kv_symmetric: softmax attention whose queries are its keys (Borji 2023)."""

from __future__ import annotations

from passes.form import Paper, Reason, Verdict, no
from passes.forms.exact import Exact
from passes.rewire import SHARED
from passes.site import AttentionSite


class KvSymmetric(Exact):
    """Softmax attention with one projection for queries and keys: its scores are symmetric.

    The graph is changed so that the attention gets its queries as keys (of a trained model the
    query's projection stays, the key's is dead), and a third of the input projections is saved. No
    head can tell before from after by its scores any more, so training follows.
    """

    name = "kv_symmetric"
    family = "exact"
    paper = Paper(
        "Borji",
        "Key-Value Transformer",
        2023,
        "https://arxiv.org/abs/2305.19129",
    )
    formula = "softmax(scale * k k^T + bias) v"
    exact = False
    needs = "training"

    def applies(self, site: AttentionSite) -> Verdict:
        """Every mask; queries and keys must be the same tokens with as many heads."""
        d = site.dims
        if site.cross or site.reduced or d.T != d.S:
            return no(
                Reason.CROSS,
                f"{site.id}: queries and keys are not the same tokens, so one can not be the other",
            )
        if d.H != d.G:
            return no(
                Reason.GROUPED,
                f"{site.id} has {d.H} heads of queries and {d.G} of keys, so one projection "
                "can not make both",
            )
        return super().applies(site)

    def rewires(self, site: AttentionSite) -> tuple[str, ...]:
        """One projection for queries and keys."""
        return (SHARED,)
