"""canonicalise: every spelling of attention becomes one SDPA node, each match proved."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from torch.fx import GraphModule, Node

from passes.builder import Builder
from passes.cleanup import (
    copy_module,
    drop_asserts,
    drop_dead,
    ensure_values,
    erase_dead,
    erase_unused,
    examples_of,
    functionalise,
)
from passes.mask import Frame, classify
from passes.match import Stop
from passes.match_sdpa import opaque_reason, rebuild_sdpa
from passes.match_softmax import constant, match_softmax
from passes.ops import op_of, val
from passes.origin import dims_of, module_path, source_line, symbol_names
from passes.own_random import own_random
from passes.prove import prove
from passes.rebuild import Rebuilt, rebuild
from passes.rewire import mark_reduced
from passes.roles import sources
from passes.site import AttentionSite, Mask, NearMiss
from passes.traced import Traced


@own_random
def canonicalise(traced: Traced) -> Traced:
    """A copy of `traced` in which every attention is one SDPA node.

    The node is ``aten.scaled_dot_product_attention.default(q, k, v, attn_mask, dropout_p,
    is_causal, scale=, enable_gqa=)`` with q [B, H, T, D], k [B, G, S, D], v [B, G, S, E], an
    attn_mask of four axes or None, and ``meta["attention_site"]``. What looks like attention
    but is not proved to be one stays as it is and is listed in ``module.meta["near_misses"]``.
    `traced` is not changed; parameters are shared with it.
    """
    module = copy_module(traced.module)
    examples = examples_of(traced, module)
    ensure_values(module, examples)
    functionalise(module)
    drop_dead(module)
    work = _Work(module, examples, symbol_names(dataclasses.replace(traced, module=module)))
    for node in list(module.graph.nodes):
        if not node._erased:
            work.visit(node)
    name_sites(module)
    mark_reduced(module)
    module.meta["near_misses"] = tuple(work.near_misses)
    module.graph.lint()
    module.recompile()
    return dataclasses.replace(traced, module=module)


class _Work:
    """One pass over one graph."""

    def __init__(
        self, module: GraphModule, examples: dict[Node, Any], names: dict[str, str]
    ) -> None:
        self.module, self.examples, self.names = module, examples, names
        self.near_misses: list[NearMiss] = []

    def visit(self, node: Node) -> None:
        """Turn `node` into a site, note a near miss, or pass over it."""
        op = op_of(node)
        if op == "sdpa" and "attention_site" not in node.meta:
            self._attempt(node, self._sdpa)
        elif op == "softmax":
            self._attempt(node, self._softmax)
        else:
            reason = opaque_reason(node)
            if reason is not None:
                self._miss(node, reason)

    def _attempt(self, node: Node, matcher: Any) -> None:
        try:
            matcher(node)
        except Stop as stop:
            self._miss(stop.node, stop.reason, node)

    def _miss(self, node: Node, reason: str, around: Node | None = None) -> None:
        around = around or node
        where = source_line(node) or source_line(around)
        path = module_path(node) or module_path(around)
        self.near_misses.append(NearMiss(node.name, reason, where, path))

    def _sdpa(self, node: Node) -> None:
        builder = Builder(node)
        rebuilt = self._built(builder, node, lambda: rebuild_sdpa(node, builder, self._number))
        plain = len(builder.made) == 1
        self._accept(builder, node, rebuilt, "sdpa", [], proved=plain)

    def _softmax(self, node: Node) -> None:
        match = match_softmax(self.module, node)
        second = match.second.node
        builder = Builder(second)
        rebuilt = self._built(builder, node, lambda: rebuild(match, builder, self._number))
        self._accept(builder, second, rebuilt, "softmax", match.inner, proved=False)

    def _number(self, value: Any) -> float | None:
        return constant(self.module, value)

    def _built(self, builder: Builder, node: Node, build: Any) -> Rebuilt:
        try:
            result: Rebuilt = build()
        except Stop:
            builder.discard()
            raise
        except Exception as error:
            builder.discard()
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise Stop(node, f"it can not be written as one attention: {reason}") from error
        return result

    def _accept(
        self,
        builder: Builder,
        old: Node,
        new: Rebuilt,
        found_by: str,
        inner: list[Node],
        *,
        proved: bool,
    ) -> None:
        """Prove, describe, and put the new nodes in the place of `old`."""
        if not proved:
            failure = prove(self.module, old, new, builder.made, self.examples)
            if failure is not None:
                builder.discard()
                raise Stop(old, failure)
        new.sdpa.meta["attention_site"] = self._site(new.sdpa, found_by)
        old.replace_all_uses_with(new.out)
        drop_asserts(inner)
        erase_dead([u for n in inner for u in n.users if u not in inner and u is not old])
        erase_unused([*inner, old])
        erase_dead([n for n in builder.made if n not in (new.out, new.sdpa)])

    def _site(self, sdpa: Node, found_by: str) -> AttentionSite:
        q, k, v, mask, dropout, causal = sdpa.args
        assert isinstance(q, Node)
        assert isinstance(k, Node)
        assert isinstance(v, Node)
        facts = Mask(causal=True) if causal else Mask()
        if isinstance(mask, Node):
            facts, remark = classify(self.module, mask, Frame.of(q, k), self.examples)
            if remark:
                sdpa.meta["mask_remark"] = remark
        return AttentionSite(
            id="",
            node=sdpa.name,
            dims=dims_of(val(q), val(k), val(v), self.names),
            dtype=str(val(q).dtype).removeprefix("torch."),
            scale=float(str(sdpa.kwargs["scale"])),
            mask=facts,
            cross=is_cross(q, k),
            dropout=float(str(dropout)),
            source=source_line(sdpa),
            found_by=found_by,
        )


def is_cross(q: Node, k: Node) -> bool:
    """Whether queries and keys are made from different activations.

    Keys that are a reduced copy of the queries' own tokens (the spatial reduction of PVT and
    Segformer) or an older part of the same sequence are no cross attention, though T != S.
    """
    return not sources(q) & sources(k)


def name_sites(module: GraphModule) -> None:
    """Give every site its id: module path, "#", and its place among those of that module."""
    seen: Counter[str] = Counter()
    for node in module.graph.nodes:
        site = node.meta.get("attention_site")
        if isinstance(site, AttentionSite):
            path = module_path(node)
            named = dataclasses.replace(site, id=f"{path}#{seen[path]}", node=node.name)
            node.meta["attention_site"] = named
            seen[path] += 1
