"""The page: self-contained, escaped, whole for any report, and its pictures are true."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from passes.site import Dims, Mask, NearMiss, SiteStatus
from rewriter import plots
from rewriter.graph_svg import draw
from rewriter.graph_view import block_graph
from rewriter.html import cards, page, warnings
from rewriter.report import RewriteReport
from tests.report.samples import bench, graph_of, report, site

VOID = {"meta", "br", "wbr", "img", "link", "hr", "input"}
# SVG's own elements may close themselves.
EVIL = "<script>alert(1)</script>&\"'$x_1$ {{ 7*7 }}"


class Balance(HTMLParser):
    """Fails on a tag that is closed out of order; collects tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag


def parsed(html: str) -> Balance:
    balance = Balance()
    balance.feed(html)
    assert balance.open == []
    return balance


def check(html: str) -> None:
    """Well formed, nothing loaded from outside, no scripts, ids unique."""
    balance = parsed(html)
    ids = [a["id"] for _, a in balance.seen if a.get("id")]
    assert len(ids) == len(set(ids))
    for tag, attributes in balance.seen:
        assert tag not in {"script", "iframe", "object", "link", "img"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href"}:
                assert (value or "").startswith("#")
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def svgs(html: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.S)]


def odd_reports() -> dict[str, RewriteReport]:
    made, nan = report(3), math.nan
    broken = replace(
        made,
        sites=tuple(replace(r, error_before_fit=math.inf, error_after_fit=nan) for r in made.sites),
        fidelity={"cosine_mean": nan, "cosine_min": nan, "relative_error": math.inf},
        compiled={
            "max_abs": math.inf,
            "tolerance": 1e-4,
            "dtype": "float32",
            "ok": False,
            "why": "x",
        },
    )
    base = site(0)
    moving = replace(made.sites[0], site=replace(base, dims=Dims("batch", 4, 2, "t", "s", 8, 8)),
                     ops_before=None, ops_after=None)  # fmt: skip
    return {
        "none": report(0),
        "many": report(40),
        "broken": broken,
        "bare": RewriteReport(model="m"),
        "slow": replace(made, timings=bench(slow=True)),
        "dynamic": replace(made, sites=(moving,)),
        "timed sites": made.with_site_ms({r.site.id: (3.0, 0.4) for r in made.sites}),
        "exact": report(2, form="exact", graph=True),
        "no picture": replace(made, graph={"site": "s", "form": "f", "note": "no picture: why"}),
        "only ours": replace(made, timings={**bench(), "engines": bench()["engines"][:1]}),
        "empty fidelity": replace(made, fidelity={}, compiled={}),
    }


@pytest.mark.parametrize("name", odd_reports())
def test_any_report_gives_a_whole_page(name: str) -> None:
    html = page(odd_reports()[name])
    check(html)
    assert not re.search(r">[^<]*\bnan\b", html)
    for svg in svgs(html):
        for part in svg.iter():
            assert "nan" not in (part.get("d") or "")


def test_the_full_page_shows_what_the_report_holds() -> None:
    made = report(6, graph=True)
    html = page(made)
    check(html)
    plain = re.sub(r"<wbr>", "", html)
    for row in made.sites:
        assert row.site.id in plain
        assert row.why in html.replace("&#39;", "'")
    for words in (
        "fused_linear_gelu",
        "linear_attention",
        "openvino is not installed",
        "softmax over the wrong axis",
        "batch was fixed to 1",
        "0.9712",
        "3.1e-06",
    ):
        assert words in plain
    assert len(svgs(html)) == 6  # before, after, latency, errors, operations, energy


def test_every_text_is_escaped() -> None:
    made = report(2, graph=True)
    sites = [replace(r.site, id=EVIL + str(i), source=EVIL) for i, r in enumerate(made.sites)]
    rows = tuple(
        replace(r, why=EVIL, form=EVIL, site=s) for r, s in zip(made.sites, sites, strict=True)
    )
    graph = dict(made.graph or {})
    graph["before"] = {
        "nodes": [{"id": EVIL, "label": EVIL, "shape": EVIL, "kind": EVIL}],
        "edges": [],
    }
    html = page(replace(
        made, model=EVIL, sites=rows, notes=(EVIL,), graph={**graph, "site": EVIL, "form": EVIL},
        near_misses=(NearMiss(EVIL, EVIL, EVIL, EVIL),), versions={EVIL: EVIL},
        timings={**bench(), "engines": [{**bench()["engines"][0], "label": EVIL, "why": EVIL}]},
    ))  # fmt: skip
    check(html)
    assert "<script" not in html
    assert "{{ 7*7 }}" in html
    svgs(html)


def test_warnings_name_what_must_not_be_missed() -> None:
    odd = odd_reports()
    assert any("NOT faster" in w for w in warnings(odd["slow"]))
    assert any("outside its tolerance" in w for w in warnings(odd["broken"]))
    assert any("not measured" in w for w in warnings(odd["empty fidelity"]))
    assert warnings(report(2)) == []
    failed = replace(report(1).sites[0], status=SiteStatus.FAILED)
    assert any("failed" in w for w in warnings(replace(report(1), sites=(failed,))))


def test_cards_show_only_what_was_measured() -> None:
    assert len(cards(RewriteReport(model="m"))) == 1
    full = {c.title: c for c in cards(report(6))}
    assert full["attention sites rewritten"].value == "5 of 6"
    assert full["compiled code error"].mood == "good"
    slow = [c for c in cards(odd_reports()["slow"]) if "eager" in c.title]
    assert slow[0].mood == "bad"
    assert slow[0].title.startswith("SLOWER")


def test_pictures_are_the_same_for_the_same_report() -> None:
    made = report(3, graph=True)
    assert page(made) == page(made)


def test_bars_have_the_measured_lengths() -> None:
    made = report(4)
    svg = ET.fromstring(plots.site_errors(made))
    space = "{http://www.w3.org/2000/svg}"
    bars = [
        p.get("d", "") for p in svg.iter(f"{space}path") if "--before" in (p.get("style") or "")
    ]
    widths = []
    for bar in bars:
        xs = [float(x) for x in re.findall(r"[ML] ([\d.]+)", bar)]
        if len(xs) >= 4:
            widths.append(max(xs) - min(xs))
    values = [r.error_before_fit or 0.0 for r in made.sites]
    widths = widths[: len(values)]
    assert len(widths) == len(values)
    scale = widths[0] / values[0]
    for width, value in zip(widths, values, strict=True):
        assert width == pytest.approx(scale * value, rel=0.02)


def test_no_chart_without_numbers() -> None:
    bare = RewriteReport(model="m")
    for chart in (plots.site_errors, plots.latency, plots.site_latency, plots.operations):
        assert chart(bare) == ""


# --- the block's picture ------------------------------------------------------------------------


def kinds(graph: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in graph["nodes"]:
        found[node["kind"]] = found.get(node["kind"], 0) + 1
    return found


@pytest.mark.parametrize("mask", [Mask(), Mask(padding=True), Mask(causal=True)], ids=str)
@pytest.mark.parametrize("form", ["elu", "hedgehog"])
def test_softmax_is_quadratic_and_linear_forms_are_not(form: str, mask: Mask) -> None:
    graph = graph_of(site(0, mask=mask), form)
    assert graph is not None
    assert graph["note"] == ""
    assert kinds(graph["before"])["quadratic"] >= 2
    assert "quadratic" not in kinds(graph["after"])
    assert kinds(graph["before"])["projection"] == 4


@pytest.mark.parametrize("form", ["exact", "elu", "hedgehog"])
def test_the_picture_is_one_connected_block(form: str) -> None:
    graph = graph_of(site(0), form)
    assert graph is not None
    for side in ("before", "after"):
        nodes = {n["id"] for n in graph[side]["nodes"]}
        edges = graph[side]["edges"]
        assert {n for edge in edges for n in edge} <= nodes
        labels = {n["id"]: n["label"] for n in graph[side]["nodes"]}
        ends = nodes - {start for start, _ in edges}
        assert [labels[n] for n in ends] == ["linear: out"]
        names = {labels[n] for n in nodes}
        assert {"q", "k", "v", "linear: query", "linear: key", "linear: value"} <= names


def test_cross_and_grouped_sites_have_pictures() -> None:
    base = site(0)
    odd = replace(base, cross=True, dims=Dims("batch", 12, 4, 7, 9, 32, 32))
    from passes.form import form_named
    from tests.report.graphs import traced_attention

    graph = block_graph(traced_attention(base), odd, form_named("elu"))
    assert graph is not None
    assert graph["note"] == ""
    shapes = {n["label"]: n["shape"] for n in graph["before"]["nodes"]}
    assert shapes["k"] == "B × G × S × 32"


def test_a_form_that_can_not_be_traced_only_costs_the_picture() -> None:
    class Broken:
        name, exact = "broken", False

        def init_params(self, _: Any) -> Any:
            raise RuntimeError("no params")

    from tests.report.graphs import traced_attention

    graph = block_graph(traced_attention(site(0)), site(0), Broken())
    assert graph is not None
    assert "no params" in graph["note"]


@pytest.mark.parametrize("form", ["exact", "hedgehog"])
def test_drawn_boxes_do_not_overlap_and_edges_go_down(form: str) -> None:
    graph = graph_of(site(0), form)
    assert graph is not None
    svg = ET.fromstring(draw(graph["after"], "t"))
    boxes = [
        tuple(float(r.get(k, "nan")) for k in ("x", "y", "width", "height"))
        for r in svg.iter("rect")
    ]
    assert len(boxes) == len(graph["after"]["nodes"])
    for i, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[:i]:
            beside = x + w <= x2 + 0.2 or x2 + w2 <= x + 0.2
            assert beside or y + h <= y2 + 0.2 or y2 + h2 <= y + 0.2
    left, top, width, height = (float(n) for n in svg.get("viewBox", "").split())
    for x, y, w, h in boxes:
        assert left <= x
        assert x + w <= left + width
        assert top <= y
        assert y + h <= top + height
    for path in svg.iter("path"):
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d", ""))]
        assert numbers[-1] > numbers[1]
