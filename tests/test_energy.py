"""Energy of whole models: EcoFormer's counting rule, its published totals, and the verb."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, PvtV2Config, PvtV2ForImageClassification

from passes.errors import UnknownName
from passes.form import form_named
from passes.plan import Plan, plan_by_rules
from rewriter.api import find_sites
from rewriter.cli import run
from rewriter.energy import EnergyReport, energy_report
from tests.by_hand import Encoder

WIDE = (64, 128, 320, 512)
SIZES: dict[str, dict[str, Any]] = {
    "B0": {},
    "B1": {"hidden_sizes": WIDE},
    "B2": {"hidden_sizes": WIDE, "depths": (3, 4, 6, 3)},
}
# Liu et al. 2022, with the released counter: multiplications, additions, millijoules.
PUBLISHED = {
    ("B0", ""): (571_428_224, 571_428_224, 2.6286),
    ("B0", "msa"): (2_015_865_904, 1_993_315_712, 9.2527),
    ("B1", "msa"): (5_019_124_144, 4_996_573_952, 23.0677),
    ("B2", "msa"): (8_640_611_832, 8_604_980_992, 39.7147),
    ("B0", "hamming"): (535_392_840, 564_786_176, 2.4893),
    ("B1", "hamming"): (2_029_620_424, 2_088_843_392, 9.3896),
    ("B2", "hamming"): (3_852_777_536, 3_965_112_192, 17.8239),
}


def pvt(**config: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A PVT v2 with weights of zero: counting reads none."""
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    side = config.get("image_size", 224)
    with torch.device("meta"):
        model = PvtV2ForImageClassification(PvtV2Config(num_labels=1000, **config))
    model = model.to_empty(device="cpu").eval()
    return model, {"pixel_values": torch.zeros(1, 3, side, side)}


@functools.cache
def stock(size: str) -> tuple[Any, Any]:
    """A stock model traced at 224 pixels, and its sites."""
    return find_sites(*pvt(**SIZES[size]))


def rewritten(size: str, form: Any, linear: Any = None) -> EnergyReport:
    traced, found = stock(size)
    plan = plan_by_rules(found.sites, {"*": form}) if form else Plan({})
    return energy_report(traced, plan, linear=linear)


@functools.cache
def other_sizes() -> tuple[Any, Any, Any]:
    """A model of other sizes traced, its sites, its config."""
    model, inputs = pvt(
        image_size=256, hidden_sizes=(24, 48, 72, 96), num_attention_heads=(1, 2, 3, 4),
        depths=(1, 2, 1, 1), mlp_ratios=(4, 3, 2, 4),
    )  # fmt: skip
    return *find_sites(model, inputs), model.config


def report(model: nn.Module, inputs: Any, form: str) -> EnergyReport:
    traced, found = find_sites(model, inputs)
    plan = plan_by_rules(found.sites, {"*": form}) if form else Plan({})
    return energy_report(traced, plan)


@pytest.mark.parametrize(
    ("size", "form"),
    [pytest.param(*k, marks=pytest.mark.slow if k[0] == "B2" else ()) for k in PUBLISHED],
)
def test_published_totals_to_the_digit(size: str, form: str) -> None:
    cost = rewritten(size, form).after
    mul, add, energy = PUBLISHED[size, form]
    assert (cost.ops.total("mul"), cost.ops.total("add")) == (mul, add)
    assert f"{cost.energy_mj:.4f}" == f"{energy:.4f}"


@pytest.mark.parametrize(
    ("size", "quantiser", "mul", "add"),
    [
        ("B0", "hash", 0.5396, 0.5684),
        ("B0", "sign", 0.5573, 0.5802),
        ("B1", "hash", 2.0382, 2.0965),
    ],
)
def test_shiftadd_attention_by_the_same_rule(
    size: str, quantiser: str, mul: float, add: float
) -> None:
    """In thousands of millions; linear layers still multiply."""
    ops = rewritten(size, form_named("shiftadd", {"quantiser": quantiser})).after.ops
    assert ops.total("mul") / 1e9 == pytest.approx(mul, abs=6e-5)
    assert ops.total("add") / 1e9 == pytest.approx(add, abs=6e-5)


def test_the_papers_headline() -> None:
    """73 % less energy than full attention on B0, but only 5 % less than the stock model."""
    full, codes = (rewritten("B0", form).after.energy_mj for form in ("msa", "hamming"))
    assert 1 - codes / full == pytest.approx(0.731, abs=5e-4)


def pvt_by_hand(side: int, config: PvtV2Config, reduce: bool) -> tuple[int, int]:
    """(multiplications, additions) by the rule, from the sizes alone."""
    shared, scale, last = 0, 0, config.num_channels
    for i, c in enumerate(config.hidden_sizes):
        side //= config.strides[i]
        n, k = side * side, config.patch_sizes[i]
        shared += n * (k * k * last * c + c) + 2 * n * c  # embedding and its norm
        for _ in range(config.depths[i]):
            m, ratio, wide = n, config.sr_ratios[i], int(config.mlp_ratios[i] * c)
            shared += 4 * n * c
            if reduce and ratio > 1:
                m = (side // ratio) ** 2
                shared += m * (ratio * ratio * c * c + c) + 2 * m * c
            shared += 2 * n * c * c + 2 * m * c * c + 2 * n * m * c
            shared += 2 * n * c * wide + n * 10 * wide
            scale += config.num_attention_heads[i] * n * m
        shared, last = shared + 2 * n * c, c
    shared += last * config.num_labels
    return shared + (0 if reduce else scale), shared


@pytest.mark.parametrize("form", ["", "msa"])
def test_other_sizes_of_pvt(form: str) -> None:
    traced, found, config = other_sizes()
    plan = plan_by_rules(found.sites, {"*": form}) if form else Plan({})
    cost = energy_report(traced, plan).after
    wanted = pvt_by_hand(256, config, reduce=not form)
    assert (cost.ops.total("mul"), cost.ops.total("add")) == wanted


def test_bert_by_the_rule() -> None:
    n, c, wide, heads, layers = 20, 32, 64, 4, 2
    config = BertConfig(
        vocab_size=100, hidden_size=c, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=wide,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    cost = report(model, {"input_ids": torch.ones(1, n, dtype=torch.long)}, "").after
    macs = layers * (4 * n * c * c + 2 * n * c * wide + 2 * n * n * c + 4 * n * c) + 2 * n * c
    assert cost.ops.total("add") == macs
    assert cost.ops.total("mul") == macs + layers * heads * n * n  # the scale


def test_layers_add_up_and_say_what_changed() -> None:
    traced, found, _ = other_sizes()
    plan = plan_by_rules(found.sites, {"*": "msa"})
    data = energy_report(traced, plan, linear="shift,*mlp*").to_json()
    for side in ("before", "after"):
        for kind in ("mul", "add", "shift", "energy_mj", "weight_bytes"):
            parts = [layer[side][kind] for layer in data["layers"] if layer[side]]
            assert sum(parts) == pytest.approx(data[side][kind], rel=1e-12)
    changed = {x["name"].split(".")[-1] for x in data["layers"] if x["before"] != x["after"]}
    attention = {"attention#0", "spatial_reduction", "layer_norm", "key", "value"}
    assert changed == attention | {"dense1", "dense2"}
    gone = [x for x in data["layers"] if x["after"] is None]
    assert {x["kind"] for x in gone} == {"conv", "norm"}


def test_other_forms_are_priced_by_their_own_counts() -> None:
    model = Encoder().eval()
    found = report(model, {"x": torch.randn(1, 40, 16)}, "elu")
    assert found.after.ops.total("mul") < found.before.ops.total("mul")
    assert set(found.unpriced) >= {"exp:float32", "div:float32"}


def test_an_unknown_energy_model_is_refused() -> None:
    traced, _ = find_sites(Encoder().eval(), {"x": torch.randn(1, 4, 16)})
    with pytest.raises(UnknownName, match="energy model 'counts'; did you mean count"):
        energy_report(traced, Plan({}), model="counts")


def bare_pvt() -> nn.Module:
    """A factory without example inputs."""
    return pvt(depths=(1, 1, 1, 1), image_size=64)[0]


def tiny() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A factory for the command line that is traced in no time."""
    return Encoder().eval(), {"x": torch.zeros(1, 40, 16)}


def test_a_hugging_face_model_needs_no_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["energy", "tests.test_energy:bare_pvt", "--image", "96", "--form", "msa", "--json"]
    assert run(argv) == 0
    data = json.loads(capsys.readouterr().out)
    mul, _ = pvt_by_hand(96, PvtV2Config(num_labels=1000, depths=[1, 1, 1, 1]), reduce=True)
    assert data["before"]["mul"] == mul < data["after"]["mul"]
    told = "1 of 4 sites keep their softmax (msa: keys and values already come from all tokens)"
    assert data["notes"] == [told]


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, picture = tmp_path / "e.html", tmp_path / "e.png"
    argv = ["energy", "tests.test_energy:tiny", "--form", "elu", "--linear", "shift,*"]
    assert run([*argv, "--json", "--html", str(page), "--png", str(picture)]) == 0
    data = json.loads(capsys.readouterr().out)
    counts = {"mul", "add", "shift", "popcount", "weight_bytes"}
    for side in ("before", "after"):
        assert set(data[side]) == counts | {"energy_mj"}
        assert all(isinstance(data[side][k], int) for k in counts)
    assert data["after"]["mul"] < data["before"]["mul"]
    assert data["after"]["shift"] > 0
    assert data["after"]["weight_bytes"] < data["before"]["weight_bytes"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert text.count("<tr") == len(data["layers"]) + 2
    assert "<svg" in text
    assert "http" not in text.split("<svg")[0]
    assert run(argv) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "less energy, weights of linear layers" in shown


def test_without_a_form_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["energy", "tests.test_energy:tiny", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["before"] == data["after"]
