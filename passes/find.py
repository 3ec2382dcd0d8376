"""find: the attention sites and near misses of a canonical graph."""

from __future__ import annotations

from dataclasses import dataclass

from passes.canonicalise import canonicalise
from passes.site import AttentionSite, NearMiss
from passes.traced import Traced


@dataclass(frozen=True)
class Found:
    """Sites in the order of the graph, and what looked like attention but was not matched."""

    sites: tuple[AttentionSite, ...]
    near_misses: tuple[NearMiss, ...]


def find(traced: Traced) -> Found:
    """Sites and near misses of `traced`, which is canonicalised first if it is not yet."""
    if "near_misses" not in traced.module.meta:
        traced = canonicalise(traced)
    module = traced.module
    sites = [n.meta["attention_site"] for n in module.graph.nodes if "attention_site" in n.meta]
    return Found(tuple(sites), tuple(module.meta["near_misses"]))
