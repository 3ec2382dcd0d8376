"""Before and after of one attention block, read off the FX graphs, as data and as SVG.

The surroundings (projections in and out) come from the model's own graph; the inside of the
attention comes from tracing the form on fake tensors, so it shows what really runs. Token
counts are traced as two marker sizes, which turns every shape back into letters (T, S).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from passes.ops import hint
from passes.site import AttentionSite

if TYPE_CHECKING:
    import torch
    from torch import fx

QUERIES, KEYS = 1009, 1013  # primes: no product or multiple of a head width meets them
MAX_STEPS = 40
# Operations that only rename or move values; the picture shows edges instead.
SILENT = {
    "view", "reshape", "transpose", "permute", "contiguous", "clone", "expand", "unsqueeze",
    "squeeze", "_to_copy", "to", "detach", "slice", "select", "alias", "_unsafe_view", "t",
    "getitem", "repeat", "flatten", "unflatten", "lift_fresh_copy", "split", "chunk", "unbind",
    "constant_pad_nd", "bitwise_not", "bitwise_and", "logical_not", "any", "dropout",
}  # fmt: skip
MATMULS = {"matmul", "bmm", "mm", "einsum", "baddbmm", "dot"}
PROJECTIONS = {"linear", "addmm"}
WORDS = {
    "_softmax": "softmax",
    "matmul": "matrix product",
    "bmm": "matrix product",
    "mm": "matrix product",
    "linear": "linear layer",
    "addmm": "linear layer",
    "scaled_dot_product_attention": "softmax attention",
    "layer_norm": "layer norm",
    "masked_fill": "mask",
    "where": "mask",
    "cat": "concatenate",
    "rsub": "subtract",
    "neg": "negate",
    "mul": "scale",
    "clamp_min": "clamp",
    "div": "divide",
    "ones_like": "ones",
}


@dataclass
class _Step:
    """One operation of a picture."""

    label: str
    shape: str
    kind: str  # "tensor", "projection", "matmul", "quadratic" or "step"
    uses: list[str] = field(default_factory=list)


def block_graph(module: fx.GraphModule, site: AttentionSite, form: Any) -> dict[str, Any] | None:
    """Picture data of one site, {"site", "form", "legend", "before", "after", "note"}.

    None where the block can not be traced: a picture is never a reason to fail.
    """
    from passes.form import form_named

    try:
        around = _around(module, site)
        before = _inside(form_named("exact"), site)
        after = before if form.exact and form.name == "exact" else _inside(form, site)
    except Exception as error:  # any trace failure only costs the picture
        return {"site": site.id, "form": form.name, "note": f"no picture: {error}"}
    d = site.dims
    same = "T" if d.T == d.S else "T, S"
    return {
        "site": site.id,
        "form": form.name,
        "legend": f"B={d.B}, H={d.H}, {same}={d.T if d.T == d.S else f'{d.T}, {d.S}'}, D={d.D}",
        "before": _plain({**before, **_joined(around, before)}),
        "after": _plain({**after, **_joined(around, after)}),
        "note": "",
    }


def _plain(steps: Mapping[str, _Step]) -> dict[str, Any]:
    nodes = [
        {"id": name, "label": s.label, "shape": s.shape, "kind": s.kind}
        for name, s in steps.items()
    ]
    edges = [[use, name] for name, s in steps.items() for use in s.uses if use in steps]
    return {"nodes": nodes, "edges": edges}


def _joined(around: Mapping[str, _Step], inside: Mapping[str, _Step]) -> dict[str, _Step]:
    """The surroundings, tied to the inside's q, k, v and output; q, k, v become the projections."""
    steps: dict[str, _Step] = {}
    last = list(inside)[-1]
    for name, step in around.items():
        uses = [last if use == "attention" else use for use in step.uses]
        steps[name] = _Step(step.label, step.shape, step.kind, uses)
    for name in ("q", "k", "v"):
        feed = around.get(f"feeds {name}")
        if name in inside and feed is not None:
            steps[name] = _Step(name, inside[name].shape, "tensor", list(feed.uses))
    return {k: v for k, v in steps.items() if not k.startswith("feeds ")}


# --- the inside: what the form computes --------------------------------------------------------


def _inside(form: Any, site: AttentionSite) -> dict[str, _Step]:
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    d = site.dims
    batch = d.B if isinstance(d.B, int) else 1
    keys = QUERIES if not site.cross and d.T == d.S else KEYS
    shapes = {
        "q": (batch, d.H, QUERIES, d.D),
        "k": (batch, d.G, keys, d.D),
        "v": (batch, d.G, keys, d.E),
    }
    params = form.init_params(site)
    spec = form.spec(site)

    def run(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        mine = {n: tensors[n] for n in params}
        if form.name != "exact":
            out: torch.Tensor = form.attend(spec, mine, q, k, v, tensors.get("key mask"))
            return out
        weights = form.weights(spec, mine, q, k, tensors.get("key mask"))
        values: torch.Tensor = v.repeat_interleave(d.H // d.G, 1) if d.G != d.H else v
        mixed: torch.Tensor = weights @ values
        return mixed

    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        example = {n: torch.empty(s) for n, s in shapes.items()}
        example.update({n: torch.empty(p.shape) for n, p in params.items()})
        if site.mask.padding:
            example["key mask"] = torch.empty((batch, keys), dtype=torch.bool)
    with torch.no_grad():
        graph = make_fx(run, tracing_mode="fake")(example).graph
    return _read(graph, list(example), _Letters(batch, d.H, d.G))


@dataclass(frozen=True)
class _Letters:
    """Sizes back to letters."""

    batch: int
    heads: int
    groups: int

    def shape(self, sizes: tuple[int, ...]) -> str:
        words = []
        for place, n in enumerate(sizes):
            marker = {QUERIES: "T", KEYS: "S"}.get(n, str(n))
            if place == 0 and n == self.batch and len(sizes) >= 3:
                marker = "B"
            elif place == 0 and len(sizes) == 3 and n == self.batch * self.heads:
                marker = "B·H"
            elif place == 1 and n in (self.heads, self.groups) and len(sizes) >= 4:
                marker = "H" if n == self.heads else "G"
            words.append(marker)
        return " × ".join(words)

    @staticmethod
    def quadratic(sizes: tuple[int, ...]) -> bool:
        return sum(n >= QUERIES for n in sizes) >= 2


def _read(graph: fx.Graph, inputs: list[str], letters: _Letters) -> dict[str, _Step]:
    steps: dict[str, _Step] = {}
    stands: dict[Any, list[str]] = {}  # node -> the shown steps that carry its value
    names = iter(inputs)
    for node in graph.nodes:
        sources = [s for used in node.all_input_nodes for s in stands.get(used, [])]
        if node.op == "placeholder":
            name = next(names)
            steps[name] = _Step(name, letters.shape(_sizes(node)), "tensor")
            stands[node] = [name]
        elif node.op != "call_function" or _op(node) in SILENT or not sources:
            stands[node] = sources
        else:
            steps[node.name] = _step(node, sources, letters)
            stands[node] = [node.name]
    return _merge(_used(steps))


def _step(node: fx.Node, sources: list[str], letters: _Letters) -> _Step:
    op, sizes = _op(node), _sizes(node)
    kind = "matmul" if op in MATMULS else "step"
    if letters.quadratic(sizes):
        kind = "quadratic"
    return _Step(
        WORDS.get(op, op.strip("_")), letters.shape(sizes), kind, list(dict.fromkeys(sources))
    )


def _used(steps: dict[str, _Step]) -> dict[str, _Step]:
    """Only what the last step depends on."""
    wanted, stack = set(), [list(steps)[-1]]
    while stack:
        name = stack.pop()
        if name not in wanted:
            wanted.add(name)
            stack.extend(steps[name].uses)
    return {name: step for name, step in steps.items() if name in wanted}


def _merge(steps: dict[str, _Step]) -> dict[str, _Step]:
    """Chains of elementwise steps of one shape become one box with their names in order."""
    users: dict[str, int] = {}
    for step in steps.values():
        for use in step.uses:
            users[use] = users.get(use, 0) + 1
    merged: dict[str, _Step] = {}
    moved: dict[str, str] = {}
    for name, step in steps.items():
        step.uses = list(dict.fromkeys(moved.get(use, use) for use in step.uses))
        before = step.uses[0] if len(step.uses) == 1 else ""
        first = merged.get(before)
        if first is not None and users.get(before) == 1 and _joins(first, step):
            first.label = f"{first.label}, {step.label}"
            moved[name] = before
            users[before] = users.get(name, 0)
        else:
            merged[name] = step
    for step in merged.values():
        step.label = _short(step.label)
    return merged


def _joins(first: _Step, step: _Step) -> bool:
    elementwise = step.label != WORDS["matmul"]
    return elementwise and first.shape == step.shape and first.kind != "tensor"


def _short(label: str) -> str:
    parts = label.split(", ")
    return ", ".join([*parts[:2], "…", parts[-1]]) if len(parts) > 4 else label


# --- the surroundings: projections of the model's own graph ------------------------------------


def _around(module: fx.GraphModule, site: AttentionSite) -> dict[str, _Step]:
    node = _attention_node(module, site)
    steps: dict[str, _Step] = {}
    if node is None:
        return steps
    for name, used in zip("qkv", node.args[:3], strict=False):
        sources = _climb(used, steps)
        steps[f"feeds {name}"] = _Step(name, "", "tensor", sources)
    _descend(node, steps)
    return steps


def _attention_node(module: fx.GraphModule, site: AttentionSite) -> fx.Node | None:
    for node in module.graph.nodes:
        found = node.meta.get("attention_site")
        if (found is not None and found.id == site.id) or node.name == site.node:
            hit: fx.Node = node
            return hit
    return None


def _climb(node: Any, steps: dict[str, _Step]) -> list[str]:
    """The steps that feed `node`, up to and with the nearest projection."""
    for _ in range(MAX_STEPS):
        if not hasattr(node, "op") or node.op != "call_function":
            return []
        op = _op(node)
        if op in PROJECTIONS:
            source = next((n for n in node.all_input_nodes if n.op == "call_function"), None)
            uses = []
            if source is not None:
                uses = [source.name]
                steps.setdefault(source.name, _outer(source, "tensor", "block input"))
            steps.setdefault(node.name, _outer(node, "projection", _module_name(node)))
            steps[node.name].uses = uses
            return [node.name]
        if op not in SILENT and op not in {"mul", "add", "div"}:
            steps.setdefault(node.name, _outer(node, "step", WORDS.get(op, op)))
            return [node.name]
        node = node.args[0]
    return []


def _descend(node: fx.Node, steps: dict[str, _Step]) -> None:
    current = node
    for _ in range(MAX_STEPS):
        users = list(current.users)
        if len(users) != 1:
            return
        current = users[0]
        if current.op == "call_function" and _op(current) in PROJECTIONS:
            step = _outer(current, "projection", _module_name(current))
            step.uses = ["attention"]
            steps[current.name] = step
            return


def _outer(node: fx.Node, kind: str, label: str) -> _Step:
    return _Step(label, " × ".join(str(n) for n in _sizes(node)), kind)


def _module_name(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    parts = [p for p in path.replace("L['self'].", "").split(".") if p and not p.isdigit()]
    return f"linear: {'.'.join(parts[-2:])}" if parts else "linear layer"


def _op(node: fx.Node) -> str:
    name: str = getattr(node.target, "__name__", str(node.target))
    name = name.split(".")[0]
    return name[:-1] if name.endswith("_") and not name.startswith("_") else name


def _sizes(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if value is None:
        value = node.meta.get("tensor_meta")
    shape = getattr(value, "shape", ())
    return tuple(hint(n) for n in shape)
