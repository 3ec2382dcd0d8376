"""Hashes learned again while a model is fine-tuned, as EcoFormer does every tau epochs.

The projections before a hash move, so codes that were learned once fit less and less. A hash that
has seen no data yet is learned before the first step; after that `every` epochs each hash is
learned anew from the model's own queries and keys (passes/forms/_hash_learn.py): anchors and
bandwidth stay, and a new row has to beat the old one (Liu et al., "EcoFormer", NeurIPS 2022).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from passes.errors import UsageError
from passes.form import Form
from passes.substitute import AttentionModule, Rewritten
from rewriter.capture import capture
from rewriter.fit_model import form_prefix
from rewriter.fit_site import REFRESH_BYTES, learn_site, refresh

BATCHES = 8  # of the training data, looked at by one refresh
Batches = Sequence[Mapping[str, Tensor]]


class Refresh:
    """Learns the hashes of `rewritten` when their epoch comes.

    `batches` are model inputs without labels, `every` the epochs between two refreshes. What is
    learned depends on the weights, the step and the seed alone, so a resumed run repeats it.
    """

    def __init__(self, rewritten: Rewritten, batches: Batches, every: int, seed: int) -> None:
        if not isinstance(every, int) or every < 0:
            raise UsageError(f"refresh: a whole number of epochs from 0, got {every!r}")
        self.rewritten, self.batches, self.every, self.seed = rewritten, batches, every, seed
        self.sites = [s.id for s in rewritten.sites if every and learns(rewritten, s.id)]

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The hashes' parameters by name: no gradient, but part of the state that is kept."""
        prefixes = tuple(form_prefix(self.rewritten, site) for site in self.sites)
        named = self.rewritten.module.named_parameters()
        return {n: p for n, p in named if not p.requires_grad and n.startswith(prefixes)}

    def before(self, step: int) -> None:
        """Called before every step: learns where an epoch that is due begins."""
        epoch, first = divmod(step, len(self.batches))
        if first or not self.sites or epoch % self.every:
            return
        draw = random.Random(f"{self.seed} refresh {epoch}")
        some = draw.sample(list(self.batches), min(BATCHES, len(self.batches)))
        if epoch:
            refresh(self.rewritten, some, seed=self.seed + epoch)
        else:
            self._first(some)

    def _first(self, some: Batches) -> None:
        """Learn the hashes that still are what they were made as."""
        modules = {s: self.rewritten.attention(s) for s in self.sites}
        new = [s for s, attention in modules.items() if _untouched(attention)]
        calls = capture(self.rewritten, some, new, REFRESH_BYTES) if new else {}
        for site in new:
            learn_site(modules[site], calls[site], self.seed)


def learns(rewritten: Rewritten, site: str) -> bool:
    """Whether the form at a site learns something from queries and keys."""
    return type(rewritten.attention(site).form).learn is not Form.learn


def _untouched(attention: AttentionModule) -> bool:
    fresh = attention.form.init_params(attention.site)
    return all(torch.equal(p.cpu().float(), fresh[n].float()) for n, p in attention.params.items())
