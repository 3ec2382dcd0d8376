"""Draws a graph of rewriter/graph_view.py as SVG: layers from top to bottom, no dependencies.

Colours are CSS classes of the page's style sheet, so the picture follows light and dark; text is
real text, so it can be searched and read aloud.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import networkx as nx

WIDTH, HEIGHT, GAP, RISE = 150, 42, 16, 26
BEND = 14  # width kept free for an edge that passes a layer
LINE = 23  # letters in one line of a box


@dataclass(frozen=True)
class _Placed:
    """Centre x of every node and the layer it is in."""

    x: Mapping[str, float]
    layer: Mapping[str, int]
    paths: list[list[str]]
    rows: list[list[str]]


def draw(graph: Mapping[str, Any], title: str) -> str:
    """The graph {"nodes", "edges"} as one <svg> element; every text is escaped."""
    nodes = {n["id"]: n for n in graph["nodes"]}
    if not nodes:
        return ""
    placed = _place(graph)
    real = [n for row in placed.rows for n in row]
    left = min(placed.x[n] - _width(n, nodes) / 2 for n in real) - 4
    right = max(placed.x[n] + _width(n, nodes) / 2 for n in real) + 4
    height = len(placed.rows) * (HEIGHT + RISE) - RISE + 8
    parts = [
        f'<svg class="graph" viewBox="{left:.0f} 0 {right - left:.0f} {height}" '
        f'style="max-width:{right - left:.0f}px" role="img" aria-label="{escape(title)}">'
    ]
    parts += [_edge(path, placed) for path in placed.paths]
    parts += [_box(node, placed.x[name], _top(placed.layer[name])) for name, node in nodes.items()]
    return "".join([*parts, "</svg>"])


def _width(name: str, nodes: Mapping[str, Any]) -> float:
    return WIDTH if name in nodes else BEND


def _top(layer: int) -> float:
    return 4 + layer * (HEIGHT + RISE)


def _edge(path: list[str], placed: _Placed) -> str:
    """A line through the bends of `path`, one smooth piece between two layers."""
    first = path[0]
    x, y = placed.x[first], _top(placed.layer[first]) + HEIGHT
    text = f"M{x:.1f} {y:.1f}"
    for name in path[1:]:
        to_x, to_y = placed.x[name], _top(placed.layer[name])
        middle = (y + to_y) / 2
        text += f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"
        x, y = to_x, to_y
        if name != path[-1]:
            y += HEIGHT
            text += f"L{x:.1f} {y:.1f}"
    return f'<path class="edge" d="{text}"/>'


def _box(node: Mapping[str, Any], x: float, y: float) -> str:
    label, shape = str(node["label"]), str(node["shape"])
    lines = [(_clip(label), "name")] + ([(_clip(shape), "shape")] if shape else [])
    start = y + HEIGHT / 2 + (5 if len(lines) == 1 else -3)
    texts = "".join(
        f'<text class="{kind}" x="{x:.1f}" y="{start + 15 * i:.1f}">{escape(text)}</text>'
        for i, (text, kind) in enumerate(lines)
    )
    return (
        f'<g class="node {escape(str(node["kind"]))}"><title>{escape(f"{label} {shape}")}</title>'
        f'<rect x="{x - WIDTH / 2:.1f}" y="{y:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="7"/>'
        f"{texts}</g>"
    )


def _clip(text: str) -> str:
    return text if len(text) <= LINE else text[: LINE - 1] + "…"


def _place(graph: Mapping[str, Any]) -> _Placed:
    order: nx.DiGraph[str] = nx.DiGraph()
    order.add_nodes_from(n["id"] for n in graph["nodes"])
    order.add_edges_from(tuple(edge) for edge in graph["edges"])
    layer = {n: i for i, row in enumerate(nx.topological_generations(order)) for n in row}
    _sink_sources(order, layer)
    full, paths = _with_bends(order, layer)
    depth = max(layer.values()) + 1
    rows = [[n for n in full if layer[n] == i] for i in range(depth)]
    _sort_rows(full, rows)
    real = set(order)
    x = _coordinates(full, rows, {n: WIDTH if n in real else BEND for n in full})
    return _Placed(x, layer, paths, rows)


def _sink_sources(order: nx.DiGraph[str], layer: dict[str, int]) -> None:
    """A tensor that enters late is drawn just above its first user."""
    for node in order:
        if order.in_degree(node) == 0 and order.out_degree(node) > 0:
            layer[node] = min(layer[user] for user in order.successors(node)) - 1


def _with_bends(
    order: nx.DiGraph[str], layer: dict[str, int]
) -> tuple[nx.DiGraph[str], list[list[str]]]:
    """Edges longer than one layer get a bend in each layer they pass."""
    full: nx.DiGraph[str] = nx.DiGraph()
    full.add_nodes_from(order)
    paths = []
    for i, (start, end) in enumerate(order.edges):
        path = [start]
        for depth in range(layer[start] + 1, layer[end]):
            bend = f"\0bend {i} {depth}"
            layer[bend] = depth
            path.append(bend)
        path.append(end)
        nx.add_path(full, path)
        paths.append(path)
    return full, paths


def _sort_rows(full: nx.DiGraph[str], rows: list[list[str]]) -> None:
    """Barycentre ordering, down and up, so that few edges cross."""
    for _ in range(6):
        for row in rows[1:]:
            _sort(row, full.pred, rows)
        for row in reversed(rows[:-1]):
            _sort(row, full.succ, rows)


def _sort(row: list[str], neighbours: Any, rows: list[list[str]]) -> None:
    place = {n: (i + 0.5) / len(r) for r in rows for i, n in enumerate(r)}
    row.sort(key=lambda n: _mean([place[m] for m in neighbours[n]], place[n]))


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _coordinates(
    full: nx.DiGraph[str], rows: list[list[str]], width: Mapping[str, float]
) -> dict[str, float]:
    """Each row is spread around its neighbours' mean without overlap."""
    x = {n: float(i) * (WIDTH + GAP) for row in rows for i, n in enumerate(row)}
    for turn in range(12):
        downward = turn % 2 == 0
        for row in rows if downward else reversed(rows):
            near = full.pred if downward else full.succ
            wish = {n: _mean([x[m] for m in near[n]], x[n]) for n in row}
            _spread(row, wish, width, x)
    return x


def _spread(
    row: list[str], wish: Mapping[str, float], width: Mapping[str, float], x: dict[str, float]
) -> None:
    """Nodes at their wished places, pushed apart left to right, then shifted back as a block."""
    blocks: list[tuple[list[str], list[float]]] = []  # nodes, offsets from the block's start
    for node in row:
        blocks.append(([node], [0.0]))
        while len(blocks) > 1 and _end(blocks[-2], wish, width) > _start(blocks[-1], wish, width):
            names, offsets = blocks.pop()
            before, far = blocks[-1]
            step = far[-1] + (width[before[-1]] + width[names[0]]) / 2 + GAP
            blocks[-1] = (before + names, far + [step + o for o in offsets])
    for names, offsets in blocks:
        origin = _mean([wish[n] - o for n, o in zip(names, offsets, strict=True)], 0.0)
        for name, offset in zip(names, offsets, strict=True):
            x[name] = origin + offset


def _start(
    block: tuple[list[str], list[float]], wish: Mapping[str, float], width: Mapping[str, float]
) -> float:
    names, offsets = block
    origin = _mean([wish[n] - o for n, o in zip(names, offsets, strict=True)], 0.0)
    return origin - width[names[0]] / 2


def _end(
    block: tuple[list[str], list[float]], wish: Mapping[str, float], width: Mapping[str, float]
) -> float:
    names, offsets = block
    origin = _mean([wish[n] - o for n, o in zip(names, offsets, strict=True)], 0.0)
    return origin + offsets[-1] + width[names[-1]] / 2 + GAP
