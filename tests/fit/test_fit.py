from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from passes.errors import FitError, UsageError
from passes.site import SiteStatus
from passes.substitute import Rewritten
from rewriter.fidelity import fidelity
from rewriter.fit import FitReport, Recipe, fit
from rewriter.fit_model import only
from tests.fit.models import batches, encoder, rewritten

QUICK = Recipe(sequential_share=0.03, site_steps=30, block_steps=30, end_steps=30, save_every=1e9)
LONG = 600.0  # steps end these fits, not time


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in module.state_dict().items()}


def test_fit_lowers_every_error_and_leaves_the_original_alone() -> None:
    made = rewritten()
    before = state(made.traced.module)
    seen: list[tuple[Any, ...]] = []
    report = fit(
        made, batches(8, 1), seconds=LONG, held_out=batches(3, 2), recipe=QUICK,
        progress=lambda *a: seen.append(a),
    )  # fmt: skip
    assert len(report.sites) == 2
    for site in report.sites:
        assert site.error_after < 0.8 * site.error_before
        assert site.divergence_after < site.divergence_before
        assert site.projection is None or site.projection[1] < site.projection[0]
    assert 1 - report.fidelity.cosine_mean < 0.7 * (1 - report.fidelity_before.cosine_mean)
    assert report.fidelity.relative_error < 0.8 * report.fidelity_before.relative_error
    assert [s.name for s in report.stages] == ["sites"] * 2 + ["sequential"] * 2 + [
        "blocks",
        "end to end",
    ]
    assert all(s.loss_after < s.loss_before for s in report.stages)
    assert {a[0] for a in seen} == {"sites", "sequential", "blocks", "end to end"}
    assert not report.reverted
    for name, value in state(made.traced.module).items():
        assert torch.equal(value, before[name]), name
    again = FitReport.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report


def test_only_what_is_trained_takes_gradients() -> None:
    made = rewritten()
    module = made.module
    some = dict(list(module.named_parameters())[:3])
    with only(module, some):
        assert {n for n, p in module.named_parameters() if p.requires_grad} == set(some)
    assert all(p.requires_grad for p in module.parameters())
    some["hash"] = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    with only(module, {"hash": some["hash"]}):
        assert all(p.requires_grad for p in module.parameters())


def test_the_seed_decides() -> None:
    def run(seed: int) -> dict[str, torch.Tensor]:
        made = rewritten()
        fit(
            made,
            batches(5, 1),
            seconds=LONG,
            seed=seed,
            recipe=Recipe(site_steps=6, block_steps=6, end_steps=6),
        )
        return state(made.module)

    first, second, third = run(0), run(0), run(1)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert any(not torch.equal(first[n], third[n]) for n in first)


def test_time_ends_a_fit() -> None:
    made = rewritten()
    report = fit(made, batches(5, 1), seconds=4.0)
    assert report.seconds < 12.0
    assert report.fidelity.cosine_mean > report.fidelity_before.cosine_mean


def best_single(made: Rewritten, data: list[dict[str, torch.Tensor]]) -> str:
    """The site whose return alone helps most."""
    from passes.substitute import revert

    gains = {}
    for site in made.plan.rewritten:
        trial = copy.deepcopy(made)
        revert(trial, site)
        gains[site] = fidelity(encoder(), trial.module, data[2:3]).cosine_mean
    return max(gains, key=lambda s: gains[s])


def test_max_drop_reverts_the_worst_site_first_and_ends_at_the_original() -> None:
    made, data = rewritten(), batches(5, 1)
    with torch.no_grad():  # one site is made useless on purpose
        bad = made.plan.rewritten[1]
        made.attention(bad).params["w_q"].zero_()
    few = copy.deepcopy(made)
    report = fit(few, data, seconds=0, max_drop=0.0, held_out=data[2:3])
    assert {r.id for r in report.reverted} == set(made.plan.rewritten)
    assert all(r.gain > 0 for r in report.reverted)
    assert report.reverted[0].id == best_single(made, data)
    assert 1 - report.fidelity.cosine_mean < 1e-6
    assert few.plan.rewritten == []
    assert few.plan[bad].status is SiteStatus.REVERTED
    assert "max_drop" in few.plan[bad].why
    x = data[0]
    torch.testing.assert_close(few.module(**x), encoder()(**x))
    loose = fit(made, data, seconds=0, max_drop=1.9)
    assert loose.reverted == ()
    assert len(made.plan.rewritten) == 2


def test_reverting_after_a_fit_brings_the_original_weights_back() -> None:
    made, data = rewritten(), batches(5, 1)
    fit(
        made,
        data,
        seconds=LONG,
        max_drop=0.0,
        recipe=Recipe(site_steps=3, block_steps=3, end_steps=3),
    )
    old = made.traced.module.state_dict()
    for name, value in made.module.state_dict().items():
        assert torch.equal(value, old[name]), name


def test_one_revert_takes_only_its_own_block() -> None:
    from rewriter.revert import block_parameters

    made = rewritten()
    first, second = made.plan.rewritten
    a, b = block_parameters(made, first), block_parameters(made, second)
    assert not a & b
    assert {n.split(".")[1] for n in a} == {"0"}
    assert {n.split(".")[1] for n in b} == {"1"}


def test_a_tied_projection_is_left_as_it_is() -> None:
    made = rewritten(encoder(tied=True))
    before = state(made.module)
    recipe = Recipe(site_steps=3, block_steps=3, end_steps=3, train="projections")
    report = fit(made, batches(5, 1), seconds=LONG, recipe=recipe)
    assert all(s.projection is None and "shared" in s.note for s in report.sites)
    after = state(made.module)
    tied = [n for n in after if ".o." in n]
    assert tied
    assert all(torch.equal(after[n], before[n]) for n in tied)
    assert any(not torch.equal(after[n], before[n]) for n in after if ".q." in n)


def test_a_form_without_parameters_gets_its_projection_refitted() -> None:
    made = rewritten(form="elu")
    recipe = Recipe(train="forms")
    report = fit(made, batches(24, 1), seconds=LONG, recipe=recipe, held_out=batches(6, 2))
    assert report.stages == ()
    done = [s.projection for s in report.sites if s.projection is not None]
    assert done
    assert all(after < before for before, after in done)
    assert report.fidelity.relative_error < report.fidelity_before.relative_error


def test_a_refit_that_makes_the_model_worse_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter import fit_site
    from rewriter.ridge import Refit

    def harmful(x: Any, y: Any, weight: Any, bias: Any, held_out: float) -> Refit:
        return Refit(-3 * weight, bias, 1e-3, 1.0, 0.5)

    monkeypatch.setattr(fit_site, "refit", harmful)
    made = rewritten(form="elu")
    before = state(made.module)
    report = fit(made, batches(6, 1), seconds=LONG, recipe=Recipe(train="forms"))
    assert all(torch.equal(value, before[n]) for n, value in state(made.module).items())
    assert all(s.projection is None and "no better" in s.note for s in report.sites)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"seconds": 0}, UsageError, "seconds"),
        ({"seconds": -3}, UsageError, "seconds"),
        ({"seconds": float("nan")}, UsageError, "seconds"),
        ({"max_drop": -0.1}, UsageError, "max_drop"),
        ({"batches": []}, FitError, "calibration data is empty"),
        ({"held_out": []}, FitError, "held-out data is empty"),
    ],
)
def test_wrong_use(change: dict[str, Any], error: type[Exception], told: str) -> None:
    call = {"batches": batches(2, 1), "seconds": 1.0, **change}
    data = call.pop("batches")
    with pytest.raises(error, match=told):
        fit(rewritten(), data, **call)


def test_no_rewritten_site_and_a_wrong_recipe() -> None:
    made = rewritten()
    for site in list(made.plan.rewritten):
        from passes.forms.exact import Exact

        made.put(site, Exact())
    with pytest.raises(UsageError, match="no site"):
        fit(made, batches(2, 1), seconds=1.0)
    with pytest.raises(UsageError, match="train"):
        Recipe(train="everything")


def test_weights_that_give_nan_are_refused_with_the_site() -> None:
    model = encoder()
    with torch.no_grad():
        model.blocks[1].q.weight[0, 0] = torch.nan
    made = rewritten(model)
    with pytest.raises(FitError, match=r"q of blocks\.1"):
        fit(made, batches(2, 1), seconds=5.0)
