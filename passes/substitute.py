"""substitute: every attention site of a canonical graph becomes a module that trains.

A site that is kept gets the form `exact`, so reverting is a swap of one submodule and lowering
meets one kind of node.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from passes.builder import Builder
from passes.errors import FormError, PlanError, UnmatchedRule
from passes.form import Form, form_named
from passes.forms.exact import Exact
from passes.graph_copy import deep_copy
from passes.ops import HIDDEN
from passes.own_random import own_random
from passes.plan import KEEP, Choice, Plan
from passes.rewire import restore, rewire, rewired
from passes.site import AttentionSite, SiteStatus
from passes.traced import Traced

FOLDER = "attention"
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
KeyMasks: TypeAlias = dict[tuple[Node, bool], Node]  # (mask, windowed) -> key mask
_ARGS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class AttentionModule(nn.Module):
    """What stands at a site: `form` with its parameters; trains.

    `params` are the form's parameters, float32 until the module is cast; those of a form that is
    not `trainable` (a hash, random features) take no gradient unless it names them `free`. The
    dropout of the site's softmax is applied by `exact` while training; other forms have none.
    """

    def __init__(self, site: AttentionSite, form: Form) -> None:
        super().__init__()
        verdict = form.applies(site)
        if not verdict:
            raise FormError(f"{form.name} can not stand at {site.id}: {verdict}")
        self.site, self.form, self.spec = site, form, form.spec(site)
        self.params = nn.ParameterDict(form.init_params(site))
        for name, param in self.params.items():
            param.requires_grad_(form.trainable or name in form.free)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attention [B, H, T, E] of q [B, H, T, D], k [B, G, S, D], v [B, G, S, E].

        `key_mask` [B or 1, S] bool, True = may be seen; `bias` broadcastable to [B, H, T, S].
        """
        params = dict(self.params.items())
        if self.training and self.site.dropout > 0 and isinstance(self.form, Exact):
            return self.form.attend(
                self.spec, params, q, k, v, key_mask, bias, dropout=self.site.dropout
            )
        return self.form.attend(self.spec, params, q, k, v, key_mask, bias)

    def extra_repr(self) -> str:
        """Form and site, for print(module)."""
        return f"form={self.form.name}, site={self.site.id!r}, mask={self.site.mask.kind}"


@dataclass
class Rewritten:
    """A model whose attentions are modules. `module` is its own copy of the traced weights."""

    module: GraphModule
    sites: tuple[AttentionSite, ...]
    plan: Plan
    traced: Traced

    def attention(self, site_id: str) -> AttentionModule:
        """The module at a site; `UnmatchedRule` if there is no such site."""
        return self._find(site_id)[1]

    @own_random
    def put(self, site_id: str, form: Form, why: str = "") -> AttentionModule:
        """Swap the form at a site in place, with fresh parameters; returns the new module.

        The plan follows: `exact` in place of another form is REVERTED. `FormError` if the form
        refuses the site.
        """
        target, old = self._find(site_id)
        site = self._wire(site_id, target, old, form)
        new = AttentionModule(site, form).train(old.training)
        new.to(_device(self.module))
        self.module.set_submodule(target, new)
        before = self.plan.choices.get(site_id)
        self.plan = self.plan.with_choice(site_id, _choice(form, before, why))
        return new

    def _wire(self, site_id: str, target: str, old: AttentionModule, form: Form) -> AttentionSite:
        """The site as `form` wants it, after the graph around it was changed where it differs."""
        site = next(s for s in self.sites if s.id == site_id)
        verdict = form.applies(rewired(site, form.rewires(site)))
        if form.rewires(site) == old.form.rewires(site) or not verdict:
            return rewired(site, form.rewires(site))
        graph = self.module.graph
        call = next(n for n in graph.nodes if n.op == "call_module" and n.target == target)
        original = next(
            n
            for n in self.traced.module.graph.nodes
            if _is_site(n) and n.meta["attention_site"].id == site_id
        )
        restore(self.module, call, original)
        site = rewire(self.module, call, site, form)
        graph.eliminate_dead_code()
        graph.lint()
        self.module.recompile()
        return site

    def _find(self, site_id: str) -> tuple[str, AttentionModule]:
        found = {
            m.site.id: (name, m)
            for name, m in self.module.named_modules()
            if isinstance(m, AttentionModule)
        }
        if site_id not in found:
            raise UnmatchedRule(f"no site {site_id!r}; the sites are: {', '.join(found) or 'none'}")
        return found[site_id]

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        return Rewritten(_copied(self.module, memo), self.sites, self.plan, self.traced)


@own_random
def substitute(traced: Traced, sites: Sequence[AttentionSite], plan: Plan) -> Rewritten:
    """Put the plan's form at every site; a site the plan does not name gets `exact`.

    Works on a copy: `traced.module` and its parameters are not touched.

    Args:
        traced: a canonical graph, whose SDPA nodes carry ``meta["attention_site"]``.
        sites: the sites found in it.
        plan: what each site gets.

    Raises:
        PlanError: a plan that names another site, or a site that the graph does not have.
        FormError: a form refuses its site.
    """
    module = _copied(traced.module)
    nodes = {n.meta["attention_site"].id: n for n in module.graph.nodes if _is_site(n)}
    _check_names(sites, plan, nodes)
    device = _device(module)
    _free_strides(module.graph)
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    key_masks: KeyMasks = {}
    for site in sorted(sites, key=lambda s: order[nodes[s.id]]):
        form = _form(plan.choices.get(site.id))
        changed = rewire(module, nodes[site.id], site, form)
        attention = AttentionModule(changed, form).to(device).train(module.training)
        _replace(module, nodes[site.id], attention, key_masks)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return Rewritten(module, tuple(sites), plan, traced)


def revert(rewritten: Rewritten, site_id: str, why: str = "") -> AttentionModule:
    """Give a site its softmax attention back; returns the new module."""
    return rewritten.put(site_id, Exact(), why)


def _copied(module: GraphModule, memo: dict[int, Any] | None = None) -> GraphModule:
    """A deep copy with its input checks; torch's own drops the hooks of a GraphModule."""
    made: GraphModule = deep_copy(module, memo)
    made._forward_pre_hooks = module._forward_pre_hooks.copy()
    made._forward_pre_hooks_with_kwargs = module._forward_pre_hooks_with_kwargs.copy()
    return made


def _form(choice: Choice | None) -> Form:
    if choice is None or choice.form == KEEP or choice.status is not SiteStatus.REWRITTEN:
        return Exact()
    return form_named(choice.form, choice.config)


def _choice(form: Form, before: Choice | None, why: str) -> Choice:
    if form.name != Exact.name:
        return Choice(form.name, form.config.to_json(), SiteStatus.REWRITTEN, why)
    if before is not None and before.status is SiteStatus.REWRITTEN:
        return Choice(KEEP, {}, SiteStatus.REVERTED, why or f"{before.form} was taken back")
    return before or Choice(KEEP, {}, SiteStatus.KEPT, why)


def _check_names(sites: Sequence[AttentionSite], plan: Plan, nodes: dict[str, Node]) -> None:
    known = {s.id for s in sites}
    for site_id in plan.choices:
        if site_id not in known:
            raise UnmatchedRule(
                f"plan names site {site_id!r}, which is not among: {', '.join(known) or 'none'}"
            )
    for site in sites:
        if site.id not in nodes:
            raise PlanError(f"site {site.id!r} is not in the graph; canonicalise and find it first")


def _free_strides(graph: Graph) -> None:
    """Views become reshapes: a form's output need not have the strides of torch's own attention,
    after which a trace leaves out ``contiguous`` where it did nothing."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


def _is_site(node: Node) -> bool:
    return node.target is _SDPA and "attention_site" in node.meta


def _device(module: nn.Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _replace(module: GraphModule, node: Node, attention: AttentionModule, made: KeyMasks) -> None:
    """Put a call of `attention` in the place of an SDPA node."""
    target = _free_name(module, attention.site.id)
    module.add_submodule(target, attention)
    q, k, v, mask = (_argument(node, name) for name in _ARGS[:4])
    key_mask, bias = _masks(node, mask, attention.site, made)
    with node.graph.inserting_before(node):
        call = node.graph.call_module(target, (q, k, v, key_mask, bias))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)


def _free_name(module: GraphModule, site_id: str) -> str:
    base = re.sub(r"\W+", "_", site_id).strip("_") or "site"
    taken = {name for name, _ in module.named_modules()}
    name, count = f"{FOLDER}.{base}", 1
    while name in taken:
        count += 1
        name = f"{FOLDER}.{base}_{count}"
    return name


def _argument(node: Node, name: str) -> Any:
    index = _ARGS.index(name)
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _masks(
    node: Node, mask: Node | None, site: AttentionSite, made: KeyMasks
) -> tuple[Node | None, Node | None]:
    """(key_mask, bias) as the site's mask asks; both None where the spec says all.

    Sites that share a mask share the key mask cut out of it.
    """
    facts = site.mask
    if not (facts.padding or facts.bias or facts.unknown):
        return None, None
    if mask is None:
        raise FormError(f"{site.id}: a {facts.kind} mask is expected, but the node has no tensor")
    if facts.bias or facts.unknown:
        return None, mask
    key = (mask, facts.window is not None)
    if key not in made:
        made[key] = _key_mask(Builder(node), mask, windowed=key[1])
    return made[key], None


def _key_mask(build: Builder, mask: Node, *, windowed: bool) -> Node:
    """[B or 1, S] bool out of a mask broadcastable to [B, H, T, S] (bool, or float 0 / -large).

    The last query sees every key that is not padding; under a window no single one does, so
    there a key counts as seen if any query sees it.
    """
    aten = torch.ops.aten
    value = mask.meta["val"]
    rank = value.dim()
    if value.dtype != torch.bool:
        mask = build.call(aten.gt.Scalar, mask, HIDDEN / 2)
    if rank >= 2 and windowed:
        mask = build.call(aten.any.dim, mask, -2)
    elif rank >= 2:
        mask = build.call(aten.select.int, mask, -2, -1)
    if rank >= 3:
        mask = build.call(aten.select.int, mask, -2, 0)
    return mask if rank == 4 else build.call(aten.unsqueeze.default, mask, 0)
