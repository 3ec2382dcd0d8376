"""RewriteReport: what it holds survives JSON, its sentences tell the truth, nothing is hidden."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from passes.errors import ArtifactError, NothingRewritten, UnknownName, UsageError
from passes.form import form_named
from passes.plan import KEEP, Choice, Plan
from passes.site import Mask, NearMiss, SiteStatus
from rewriter.report import RewriteReport
from rewriter.report_rows import KernelRow
from rewriter.verify import compare_arrays
from tests.report.graphs import traced_attention
from tests.report.samples import bench, planned, report, site


def text_of(view: Any, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view)
    return console.export_text()


def started(sites: list[Any], plan: Plan, **traced: Any) -> RewriteReport:
    shown = traced_attention(sites[0]) if sites else torch.fx.GraphModule({}, torch.fx.Graph())
    made = {"module": shown, "tracer": "export", "notes": ("a note",), "dynamic": {},
            "example_args": (), "example_kwargs": {}, **traced}  # fmt: skip
    misses = (NearMiss("n", "probabilities are used elsewhere", "m.py:3"),)
    found = SimpleNamespace(sites=sites, near_misses=misses)
    return RewriteReport.start("tiny", SimpleNamespace(**made), found, plan)


def test_start_tells_every_site_with_every_form_s_verdict() -> None:
    sites = [site(0), site(1, mask=Mask(bias=True))]
    made = started(sites, planned(sites, "hedgehog"))
    assert [r.status for r in made.sites] == [SiteStatus.REWRITTEN, SiteStatus.REFUSED]
    assert (made.sites_found, made.sites_rewritten) == (2, 1)
    assert made.sites[1].exact
    assert "M01" in made.sites[1].why
    for row in made.sites:
        for name, verdict in row.verdicts.items():
            assert verdict["ok"] == bool(form_named(name).applies(row.site))
    first = made.sites[0]
    assert first.ops_before == form_named("exact").ops(first.site)
    assert first.ops_after == form_named("hedgehog").ops(first.site)
    assert made.near_misses[0].reason.startswith("probabilities")
    assert "a note" in made.notes


def test_dynamic_sites_are_counted_at_the_example_s_sizes() -> None:
    moving = replace(site(0), dims=replace(site(0).dims, T="tokens", S="tokens"))
    unknown = replace(site(1), dims=replace(site(1).dims, T="other", S="other"))
    made = started(
        [moving, unknown],
        planned([moving, unknown], "elu"),
        dynamic={"x": {1: "tokens"}},
        example_kwargs={"x": torch.zeros(1, 64, 8)},
    )
    assert made.sizes == {"tokens": 64}
    static = replace(moving, dims=moving.dims.static({"tokens": 64}))
    assert made.sites[0].ops_after == form_named("elu").ops(static)
    assert made.sites[1].ops_after is None
    assert any("tokens=64" in note for note in made.notes)
    assert RewriteReport.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize("count", [0, 1, 7])
def test_json_round_trip(count: int, tmp_path: Path) -> None:
    made = report(count, graph=count == 1)
    text = json.dumps(made.to_json(), allow_nan=False)
    assert RewriteReport.from_json(json.loads(text)) == made
    made.save(tmp_path / "report.json")
    assert RewriteReport.load(tmp_path / "report.json") == made
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_values_that_are_not_finite_survive_strict_json() -> None:
    made = report(2)
    rows = (replace(made.sites[0], error_after_fit=math.nan), made.sites[1])
    broken = replace(
        made, sites=rows, fidelity={"cosine_mean": math.nan, "relative_error": math.inf}
    )
    back = RewriteReport.from_json(json.loads(json.dumps(broken.to_json(), allow_nan=False)))
    assert math.isnan(back.sites[0].error_after_fit or 0.0)
    assert back.fidelity is not None
    assert math.isnan(back.fidelity["cosine_mean"])
    assert back.fidelity["relative_error"] == math.inf
    assert "not finite" in back.summary()


def test_the_json_contract_of_compile() -> None:
    data = report(6).to_json()
    assert data["sites_found"] == 6
    assert data["sites_rewritten"] == 5
    assert data["compiled_max_abs_error"] == pytest.approx(3.1e-6)
    assert {"cosine_mean", "relative_error"} <= set(data["fidelity"])
    assert all(k["name"] and k["scheduled_by"] for k in data["kernels"])
    assert {"id", "status", "why", "form", "dims", "mask", "cross"} <= set(data["sites"][0])
    assert data["near_misses"][0]["status"] == "NEAR_MISS"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "not a report"),
        ([], "not a report"),
        ({"schema": 99, "model": "m"}, "not a report"),
        ({"schema": 1, "model": "m", "sites": [{"id": "x"}]}, "damaged"),
        ({"schema": 1, "model": "m", "kernels": 3}, "damaged"),
        ({"schema": 1, "model": "m", "near_misses": [{}]}, "damaged"),
    ],
)
def test_foreign_data_is_a_clear_error(data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RewriteReport.from_json(data)


def test_files_that_can_not_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can not be read"):
        RewriteReport.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        RewriteReport.load(tmp_path / "bad.json")
    with pytest.raises(ArtifactError, match="can not be written"):
        report(1).save(tmp_path / "no" / "folder" / "r.json")


def test_with_fit_takes_errors_fidelity_and_the_plan_it_left() -> None:
    made = report(3)
    ids = [r.site.id for r in made.sites]
    plan = planned([r.site for r in made.sites]).with_choice(
        ids[1], Choice(KEEP, {}, SiteStatus.REVERTED, "cost too much")
    )
    fitted = {
        "sites": [{"id": ids[0], "error_before": 0.6, "error_after": 0.1}],
        "fidelity": {"cosine_mean": 0.99, "cosine_min": 0.9, "relative_error": 0.1},
        "notes": ["stopped early"],
    }
    after = made.with_fit(fitted, plan)
    assert (after.sites[0].error_before_fit, after.sites[0].error) == (0.6, 0.1)
    assert after.sites[1].status is SiteStatus.REVERTED
    assert after.sites[1].exact
    assert after.sites[1].error == 0
    assert after.sites[1].ops_after == after.sites[1].ops_before
    assert after.fidelity == fitted["fidelity"]
    assert "stopped early" in after.notes
    assert made.sites[1].status is not SiteStatus.REVERTED


def test_with_compiled_takes_error_stats_and_kernels_of_any_shape() -> None:
    want = {"y": torch.randn(3, 4).double().numpy()}
    stats = compare_arrays({"y": want["y"] + 1e-7}, want)
    kernels = [
        SimpleNamespace(
            name="a", scheduled_by="matmul", ops=form_named("elu").ops(site(0)), count=3
        ),
        {"name": "b", "scheduled_by": "softmax"},
        KernelRow("c", "tuned"),
    ]
    made = report(2).with_compiled(stats, kernels, {"name": "cpu"}, notes=["n"])
    assert made.compiled_max_abs_error == pytest.approx(1e-7, rel=1e-3)
    assert [k.scheduled_by for k in made.kernels] == ["matmul", "softmax", "tuned"]
    assert [k.calls for k in made.kernels] == [3, 1, 1]
    assert made.kernels[0].ops == form_named("elu").ops(site(0))
    unrun = report(2).with_compiled(None, kernels, {"name": "edge"})
    assert unrun.compiled_max_abs_error is None
    assert "tolerance" not in unrun.summary()


def test_require_and_lookup() -> None:
    made = report(6)
    assert made.require(5) is made
    with pytest.raises(NothingRewritten, match="5 of 6 sites, 6 were required") as caught:
        made.require(6)
    assert "costs 0.03" in str(caught.value)
    with pytest.raises(UnknownName, match="did you mean"):
        made.site("encoder.layer.0.attention.self#9")
    told = made.explain("encoder.layer.0.attention.self#0")
    assert "hedgehog: yes" in told
    assert "modeling_bert.py:380" in told


def test_exact_and_approximate_are_kept_apart() -> None:
    exact = report(3, form="exact")
    assert exact.approximate == ()
    assert "No attention site is approximated" in exact.summary()
    mixed = report(3)
    assert [r.site.id for r in mixed.approximate] == [r.site.id for r in mixed.sites[:2]]
    unmeasured = replace(mixed, fidelity=None)
    assert "not measured" in unmeasured.summary()


def test_never_slower_in_silence() -> None:
    fast, slow = report(2), replace(report(2), timings=bench(slow=True))
    assert fast.faster is True
    assert fast.beaten_by == ()
    assert "faster than eager PyTorch" in fast.summary()
    assert slow.faster is False
    assert len(slow.beaten_by) == 4
    assert "SLOWER than eager PyTorch" in slow.summary()
    assert "NOT faster than" in slow.summary()
    assert replace(fast, timings=None).faster is None
    loaded = replace(fast, timings={**bench(), "load": 1.5})
    assert "busy" in loaded.summary()
    assert "busy" not in fast.summary()
    data = slow.to_json()
    assert data["faster"] is False


def test_out_of_tolerance_is_said() -> None:
    made = report(2)
    assert made.compiled is not None
    bad = replace(made, compiled={**made.compiled, "ok": False, "why": "output 'y' is wrong"})
    assert "NOT within" in bad.summary()
    assert "OUT OF TOLERANCE" in text_of(bad.table())


def test_the_terminal_table_shows_everything_and_parses_no_markup() -> None:
    made = report(6)
    odd = replace(made.sites[0], why="[bold red]x[/bold red] [/nonsense]")
    shown = text_of(replace(made, sites=(odd, *made.sites[1:])).table(), 260)
    for row in made.sites:
        assert row.site.id in shown
    assert "[bold red]x[/bold red] [/nonsense]" in shown
    for words in ("linear_attention", "openvino is not installed", "batch was fixed to 1",
                  "softmax over the wrong axis", "REVERTED"):  # fmt: skip
        assert words in shown
    assert "no attention was found" in report(0).summary()
    text_of(report(0).table())
