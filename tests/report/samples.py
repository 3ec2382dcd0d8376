"""Reports made by the real code from real forms, sites and traced graphs; numbers are random."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from passes.opcount import OpCount
from passes.plan import Plan, plan_by_rules
from passes.site import AttentionSite, Dims, Mask, NearMiss, SiteStatus
from rewriter.report import RewriteReport, _row, versions
from rewriter.report_rows import KernelRow

ENGINES = (
    ("ours", "this artifact"),
    ("eager", "PyTorch eager"),
    ("inductor", "torch.compile"),
    ("onnxruntime", "ONNX Runtime"),
    ("openvino-f32", "OpenVINO (float32)"),
)


def site(index: int, *, mask: Mask | None = None, tokens: int | str = 512) -> AttentionSite:
    return AttentionSite(
        id=f"encoder.layer.{index}.attention.self#0",
        node=f"scaled_dot_product_attention_{index}",
        dims=Dims(1, 12, 12, tokens, tokens, 32, 32),
        dtype="float32",
        scale=32**-0.5,
        mask=mask or Mask(padding=True),
        source="modeling_bert.py:380",
    )


def planned(sites: list[AttentionSite], form: str = "hedgehog") -> Plan:
    return plan_by_rules(sites, {"*": form} if sites else {})


def graph_of(first: AttentionSite, form: str) -> dict[str, Any] | None:
    from passes.form import form_named
    from rewriter.graph_view import block_graph
    from tests.report.graphs import traced_attention

    return block_graph(traced_attention(first), first, form_named(form))


def bench(seed: int = 0, slow: bool = False) -> dict[str, Any]:
    rng = random.Random(seed)
    rows = []
    for name, label in ENGINES:
        ms = rng.uniform(30, 90) if name != "ours" else (200.0 if slow else 20.0)
        rows.append(
            {
                "engine": name,
                "label": label,
                "status": "ok",
                "median_ms": ms,
                "q1_ms": ms * 0.97,
                "q3_ms": ms * 1.06,
                "ratio": None,
                "max_abs_error": rng.uniform(1e-6, 5e-6),
                "runs": 40,
                "why": "",
            }
        )
    ours = rows[0]["median_ms"]
    rows = [{**r, "ratio": r["median_ms"] / ours} for r in rows]
    skipped = dict.fromkeys(("median_ms", "q1_ms", "q3_ms", "ratio", "max_abs_error"))
    rows.append(
        {"engine": "openvino-default", "label": "OpenVINO (its default)", "status": "skipped",
         "runs": 0, "why": "openvino is not installed", **skipped}
    )  # fmt: skip
    return {"threads": 2, "engines": rows, "machine": {"cpu": "a processor"}, "notes": []}


def report(
    count: int = 6, *, form: str = "hedgehog", graph: bool = False, seed: int = 0
) -> RewriteReport:
    rng = random.Random(seed)
    sites = [site(i) for i in range(count)]
    plan = planned(sites, form)
    rows = tuple(
        replace(
            _row(s, plan, {}),
            error_before_fit=rng.uniform(0.3, 0.8),
            error_after_fit=rng.uniform(0.02, 0.2),
        )
        for s in sites
    )
    if count > 2:
        back = replace(rows[-1], status=SiteStatus.REVERTED, form="keep", exact=True)
        back = replace(back, why="costs 0.03 of cosine", ops_after=back.ops_before)
        rows = (*rows[:-1], back)
    return RewriteReport(
        model="minilm",
        tracer="export",
        sites=rows,
        near_misses=(NearMiss("softmax_9", "softmax over the wrong axis", "model.py:12", "head"),),
        kernels=(
            KernelRow("fused_linear_gelu", "linear", OpCount.of(mul=10**9, add=10**9), 6),
            KernelRow("hedgehog_attention", "linear_attention", None, 5),
        ),
        fidelity={"cosine_mean": 0.9712, "cosine_min": 0.91, "relative_error": 0.21,
                  "nn_agreement": 0.8, "samples": 64},
        compiled={"max_abs": 3.1e-6, "max_rel": 1e-5, "rms_ratio": 4e-7, "cosine_min": 0.9999999,
                  "tolerance": 1e-4, "rms_tolerance": 1e-5, "dtype": "float32", "ok": True,
                  "why": ""},
        target={"name": "cpu", "kind": "cpu"},
        timings=bench(seed),
        graph=graph_of(sites[0], form) if graph and sites else None,
        versions=versions(),
        notes=("batch was fixed to 1",),
    )  # fmt: skip
