"""JSON round trips and small rules of the core types."""

from __future__ import annotations

import itertools
import json
from dataclasses import FrozenInstanceError, dataclass

import pytest

from passes import errors
from passes.errors import RewriterError, UnknownName, UsageError
from passes.form import YES, FormConfig, FormSpec, Reason, Verdict, no
from passes.opcount import OPS, OpCount
from passes.plan import Choice, Plan
from passes.site import AttentionSite, Dims, Mask, NearMiss, SiteStatus

MASKS = [
    Mask(c, p, w, b, u)
    for c, p, w, b, u in itertools.product(
        [False, True], [False, True], [None, (3, 0)], [False, True], [False, True]
    )
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.kind)
def test_site_round_trip(mask: Mask) -> None:
    site = AttentionSite(
        "enc.0#1", "sdpa_3", Dims("batch", 8, 2, "seq", 77, 64, 32), "bfloat16", 0.125, mask,
        True, 0.1, "model.py:31", "softmax",
    )  # fmt: skip
    data = json.loads(json.dumps(site.to_json()))
    assert AttentionSite.from_json(data) == site
    assert hash(AttentionSite.from_json(data)) == hash(site)
    assert (data["id"], data["cross"], data["causal"]) == ("enc.0#1", True, mask.causal)
    assert data["mask"] == mask.kind
    assert AttentionSite.from_json({**data, "added_later": 1}) == site


def test_mask_kinds() -> None:
    assert Mask().kind == "none"
    assert Mask(causal=True, padding=True).kind == "causal+padding"
    assert Mask(window=(1, 1)).kind == "window"
    assert len({m.kind for m in MASKS}) == len(MASKS)


def test_static_dims() -> None:
    dims = Dims("batch", 8, 2, "seq", "seq", 64, 64)
    assert dims.static({"batch": 3, "seq": 5}) == Dims(3, 8, 2, 5, 5, 64, 64)
    with pytest.raises(KeyError):
        dims.static({"batch": 3})


def test_near_miss_round_trip() -> None:
    miss = NearMiss("softmax_2", "wrong axis", "model.py:3", "enc.0")
    data = json.loads(json.dumps(miss.to_json()))
    assert data["status"] == "NEAR_MISS"
    assert NearMiss.from_json(data) == miss


def test_plan_round_trip() -> None:
    plan = Plan(
        {
            f"a.{i}#0": Choice("elu", {"x": [1, 2]}, status, "why not")
            for i, status in enumerate(SiteStatus)
        }
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_spec_round_trip_is_canonical() -> None:
    one = FormSpec("f", True, 0.1, (3, 4), {"b": 1, "a": [2]})
    two = FormSpec("f", True, 0.1, (3, 4), {"a": [2], "b": 1})
    assert one.dumps() == two.dumps()
    assert FormSpec.loads(one.dumps()) == one
    assert FormSpec.loads(FormSpec("f", False, 1 / 3).dumps()).scale == 1 / 3


def test_verdict_is_falsy_when_it_refuses() -> None:
    refusal = no(Reason.HEAD_DIM, "head width 7 is odd")
    assert YES
    assert not refusal
    assert (str(YES), str(refusal)) == ("yes", "D01: head width 7 is odd")
    assert refusal == Verdict(False, Reason.HEAD_DIM, "head width 7 is odd")
    assert len(set(Reason)) == len(Reason.__members__)


def test_types_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Mask().causal = True  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        YES.ok = False  # type: ignore[misc]


def test_opcount_adds_multiplies_and_round_trips() -> None:
    a = OpCount.of(mul=3, add=2, exp=0, read=8, written=4)
    b = OpCount.of("int8", mul=5, read=1)
    both = a + b + a
    assert dict(both.ops) == {
        ("mul", "float32"): 6, ("add", "float32"): 4, ("mul", "int8"): 5
    }  # fmt: skip
    assert (both.bytes_read, both.bytes_written) == (17, 8)
    assert (both.total(), both.total("mul"), both.total("exp")) == (15, 11, 0)
    assert a * 2 + b == both
    assert list(a) == [("add", "float32", 2), ("mul", "float32", 3)]
    assert OpCount.from_json(json.loads(json.dumps(both.to_json()))) == both
    assert OpCount() + a == a


def test_opcount_knows_its_vocabulary() -> None:
    assert OpCount.of(**dict.fromkeys(OPS, 1)).total() == len(OPS)
    with pytest.raises(ValueError, match="fused"):
        OpCount({("fused", "float32"): 1})


def test_form_config() -> None:
    @dataclass(frozen=True)
    class Options(FormConfig):
        width: int = 3

    assert Options.from_json(Options(5).to_json()) == Options(5)
    with pytest.raises(UnknownName, match="did you mean width"):
        Options.from_json({"widht": 3})


def test_errors_are_one_tree_with_exit_codes() -> None:
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(found) > 10
    for error in found:
        assert issubclass(error, RewriterError)
        assert error.exit_code == (2 if issubclass(error, UsageError) else 1)
        assert (error.__doc__ or "").strip()


def test_unknown_names_suggest() -> None:
    error = UnknownName("target", "cpuu", ["cpu", "cuda:sm_90"])
    assert str(error) == "unknown target 'cpuu'; did you mean cpu?"
    assert error.near == ["cpu"]
    assert str(UnknownName("form", "zzz", ["elu"])) == "unknown form 'zzz'; known: elu."
