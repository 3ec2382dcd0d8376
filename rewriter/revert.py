"""Giving the worst sites their softmax back until a fidelity holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.fx import Node

from passes.graph_copy import deep_copy
from passes.substitute import Rewritten, revert
from rewriter.fidelity import Fidelity
from rewriter.fit_model import projections
from rewriter.fit_report import Revert
from rewriter.linears import site_node

Measure = Callable[[nn.Module], Fidelity]


def revert_worst(
    rewritten: Rewritten, measure: Measure, max_drop: float, now: Fidelity
) -> tuple[list[Revert], Fidelity]:
    """Revert sites in place, the one whose return helps most first, until the drop is allowed.

    Every site still rewritten is tried on a copy at each turn (the gains are measured, not
    added up). A reverted site's layers get the original weights back. With no site left, the
    whole model has them.

    Returns:
        (what was reverted and why, the fidelity that was left).
    """
    done: list[Revert] = []
    while 1 - now.cosine_mean > max_drop and rewritten.plan.rewritten:
        trials = [(_trial(rewritten, s, measure), s) for s in rewritten.plan.rewritten]
        best, site = max(trials, key=lambda t: t[0].cosine_mean)
        drop, gain = 1 - now.cosine_mean, best.cosine_mean - now.cosine_mean
        why = f"drop {drop:.4g} over max_drop {max_drop:g}; {drop - gain:.4g} without this site"
        take_back(rewritten, site, why)
        now = measure(rewritten.module)
        done.append(Revert(site, why, gain))
    return done, now


def _trial(rewritten: Rewritten, site: str, measure: Measure) -> Fidelity:
    trial = deep_copy(rewritten)
    take_back(trial, site, "")
    return measure(trial.module)


def take_back(rewritten: Rewritten, site: str, why: str) -> None:
    """Softmax and the original weights for one site and its layers; all weights at the last one."""
    names = block_parameters(rewritten, site)
    revert(rewritten, site, why)
    if not rewritten.plan.rewritten:
        names = {n for n, _ in rewritten.module.named_parameters()}
    restore(rewritten, names)


@torch.no_grad()
def restore(rewritten: Rewritten, names: set[str]) -> None:
    """The traced values of the parameters `names` (those of forms have none and stay)."""
    old = dict(rewritten.traced.module.named_parameters(remove_duplicate=False))
    for name, param in rewritten.module.named_parameters(remove_duplicate=False):
        if name in names and name in old:
            param.copy_(old[name])


def block_parameters(rewritten: Rewritten, site: str) -> set[str]:
    """Parameters of a site's projections, and of what follows it up to the next site's.

    Parameters used in more than one such block belong to none.
    """
    owner = _owners(rewritten)
    return {name for name, sites in owner.items() if sites == {site}}


def _owners(rewritten: Rewritten) -> dict[str, set[str]]:
    calls = {site_node(rewritten, s.id): s.id for s in rewritten.sites}
    own = {p.node: s.id for s in rewritten.sites for p in projections(rewritten, s.id)}
    owner: dict[str, set[str]] = {}
    block = ""
    for node in rewritten.module.graph.nodes:
        block = calls.get(node, block)
        for source in _parameters_of(node):
            owner.setdefault(str(source.target), set()).add(own.get(node, block))
    return owner


def _parameters_of(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if n.op == "get_attr"]
