"""Plans: by rules, by hand, saved and bound to a model again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from passes.errors import PlanError, UnknownName, UnmatchedRule
from passes.form import form_named
from passes.plan import KEEP, Choice, Plan, bind_plan, choose, plan_by_rules
from passes.site import AttentionSite, Mask, SiteStatus
from tests.by_hand import site


def sites(*ids: str, **masks: Mask) -> list[AttentionSite]:
    base = site()
    return [
        AttentionSite(i, "n", base.dims, base.dtype, base.scale, masks.get(i[0], Mask()))
        for i in ids
    ]


FOUR = ("encoder.0.attn#0", "encoder.1.attn#0", "encoder.10.attn#0", "decoder.0.attn#0")


def test_the_default_is_keep() -> None:
    plan = plan_by_rules(sites(*FOUR), {})
    assert list(plan.choices) == list(FOUR)
    assert plan.rewritten == []
    assert {c.status for c in plan.choices.values()} == {SiteStatus.KEPT}


def test_the_first_matching_rule_wins() -> None:
    rules = {"encoder.1.*": "elu", "encoder.*": "hedgehog", "*": KEEP}
    plan = plan_by_rules(sites(*FOUR), rules)
    assert [plan[i].form for i in FOUR] == ["hedgehog", "elu", "hedgehog", KEEP]
    assert plan.rewritten == list(FOUR[:3])
    assert plan[FOUR[1]].why == "rule 'encoder.1.*'"


def test_a_rule_may_be_a_module_path_an_id_a_class_of_characters_or_a_form() -> None:
    plan = plan_by_rules(sites(*FOUR), {"encoder.1.attn": "elu"}, default="hedgehog")
    assert [plan[i].form for i in FOUR] == ["hedgehog", "elu", "hedgehog", "hedgehog"]
    assert plan_by_rules(sites(*FOUR), {FOUR[3]: "elu"}).rewritten == [FOUR[3]]
    plan = plan_by_rules(sites(*FOUR), {"encoder.[0-3].*": form_named("elu")})
    assert plan.rewritten == list(FOUR[:2])


def test_a_rule_shadowed_by_an_earlier_one_is_no_error() -> None:
    assert plan_by_rules(sites(*FOUR), {"*": "elu", "encoder.*": "hedgehog"})[FOUR[0]].form == "elu"


def test_a_rule_without_a_site_is_an_error_that_lists_the_sites() -> None:
    with pytest.raises(UnmatchedRule, match=r"'encodr\.\*' matches no site.*encoder\.0\.attn#0"):
        plan_by_rules(sites(*FOUR), {"encodr.*": "elu"})
    with pytest.raises(UnmatchedRule, match="none at all"):
        plan_by_rules([], {"*": "elu"})


def test_an_unknown_form_is_an_error_even_where_nothing_matches() -> None:
    with pytest.raises(UnknownName, match="hedgehog"):
        plan_by_rules(sites(*FOUR), {"*": "hedgehgo"})


def test_refusals_keep_the_site_and_say_why() -> None:
    found = sites(*FOUR, d=Mask(bias=True))
    plan = plan_by_rules(found, {"*": "hedgehog"})
    assert plan.rewritten == list(FOUR[:3])
    choice = plan[FOUR[3]]
    assert (choice.form, choice.status) == (KEEP, SiteStatus.REFUSED)
    assert choice.why.startswith("hedgehog: M01: ")
    assert choose(form_named("exact"), found[3], "because").status is SiteStatus.REWRITTEN


def test_save_and_load(tmp_path: Path) -> None:
    plan = plan_by_rules(sites(*FOUR, d=Mask(unknown=True)), {"*": "hedgehog"})
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert list(Plan.load(path).choices) == list(FOUR)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_written_by_hand() -> None:
    data = {"schema": 1, "sites": {FOUR[0]: "elu", FOUR[1]: {"form": "hedgehog", "config": None},
                                   FOUR[2]: KEEP}}  # fmt: skip
    plan = bind_plan(Plan.from_json(data), sites(*FOUR))
    assert [plan[i].form for i in FOUR] == ["elu", "hedgehog", KEEP, KEEP]
    assert [plan[i].status for i in FOUR[:3]] == [SiteStatus.REWRITTEN] * 2 + [SiteStatus.KEPT]
    assert plan[FOUR[3]].why == "not in the plan"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], 'expected an object with "schema" and "sites"'),
        ({"schema": 1}, 'expected an object with "schema" and "sites"'),
        ({"schema": 1, "sites": []}, 'expected an object with "schema" and "sites"'),
        ({"sites": {}}, "schema None is not 1"),
        ({"schema": 99, "sites": {}}, "schema 99 is not 1"),
        ({"schema": 1, "sites": {"a#0": 3}}, "'a#0' needs a \"form\""),
        ({"schema": 1, "sites": {"a#0": {"config": {}}}}, "'a#0' needs a \"form\""),
        ({"schema": 1, "sites": {"a#0": {"form": "elu", "status": "MAYBE"}}}, "status 'MAYBE'"),
        ({"schema": 1, "sites": {"a#0": {"form": "elu", "status": []}}}, "unknown status"),
        ({"schema": 1, "sites": {"a#0": {"form": "elu", "config": [1]}}}, "must be an object"),
    ],
)
def test_bad_plans_are_explained(data: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert message in str(caught.value)
    assert "bad.json" in str(caught.value)
    assert caught.value.exit_code == 2


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="can not be read"):
        Plan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="can not be read"):
        Plan.load(tmp_path)
    for content in (b"{", b"\xff\xfe\x00", b""):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(PlanError, match="not JSON"):
            Plan.load(tmp_path / "x.json")


def test_saving_where_it_can_not_is_a_plan_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="can not be written"):
        Plan({}).save(tmp_path / "no" / "folder.json")
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(PlanError, match="can not be written"):
        Plan({}).save(tmp_path / "taken.json")
    assert [p.name for p in tmp_path.iterdir()] == ["taken.json"]


def test_binding_asks_every_form_again() -> None:
    plan = plan_by_rules(sites(*FOUR), {"*": "elu"})
    bound = bind_plan(plan, sites(*FOUR, d=Mask(window=(4, 4))))
    assert bound.rewritten == list(FOUR[:3])
    assert bound[FOUR[3]].status is SiteStatus.REFUSED
    assert bound[FOUR[3]].why.startswith("elu: M03")


def test_binding_keeps_what_was_reverted() -> None:
    plan = plan_by_rules(sites(*FOUR), {"*": "elu"})
    plan = plan.with_choice(FOUR[0], Choice(KEEP, {}, SiteStatus.REVERTED, "too far off"))
    assert bind_plan(plan, sites(*FOUR)) == plan


def test_a_form_edited_by_hand_needs_no_new_status() -> None:
    rewritten, kept = SiteStatus.REWRITTEN, SiteStatus.KEPT
    plan = Plan({FOUR[0]: Choice(KEEP, {}, rewritten), FOUR[1]: Choice("elu", {}, kept)})
    bound = bind_plan(plan, sites(*FOUR))
    assert bound.rewritten == [FOUR[1]]
    assert bound[FOUR[0]].status is kept


def test_binding_to_another_model_is_an_error() -> None:
    plan = plan_by_rules(sites(*FOUR), {"*": "elu"})
    with pytest.raises(
        UnmatchedRule, match=r"'encoder\.0\.attn#0', which this model does not have"
    ):
        bind_plan(plan, sites("other#0"))


def test_binding_checks_forms_and_options() -> None:
    for choice in (Choice("nope"), Choice("elu", {"nope": 1})):
        with pytest.raises(UnknownName, match="nope"):
            bind_plan(Plan({FOUR[0]: choice}), sites(*FOUR))
