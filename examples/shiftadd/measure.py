"""What a trained row is: accuracy, operations, energy, error, size and time of its artifact."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from examples.mnist.data import accuracy, digits
from examples.shiftadd.stages import Stage, Subject, built, weights_of
from passes.moe_balance import Balance
from passes.plan import Plan
from rewriter import Result, compile, load
from rewriter.api import find_sites, make_plan
from rewriter.energy import Cost, energy_report
from rewriter.models import load_model

ROUNDS, CALLS = 120, 4
TEST = 250  # digits at a time, as `accuracy` takes them


def figures(subject: Subject, stage: Stage) -> dict[str, Any]:
    """All of a row but its time; the artifact is left in `OUT`."""
    _, (held, _), (x, y) = digits()
    wide = built(subject, stage, x[:TEST], done=True)
    shares = to_shift(wide, held[:TEST]) if stage.linear == "moe" else {}
    one = built(subject, stage, x[:1], done=True)
    path = artifact_of(subject, stage)
    artifact = compile(one, path=path, threads=1)
    error = artifact.report["compiled_max_abs_error"]
    artifact.close()
    done = json.loads(weights_of(subject, stage.name).with_suffix(".json").read_text())
    plan = with_shares(one.plan, shares)
    return {
        "model": subject.name,
        "row": stage.name,
        "accuracy": accuracy(wide.model, x, y),
        "loss": done["loss_after"],
        "steps": done["steps"],
        "error": error,
        "kilobytes": path.stat().st_size / 1000,
        "to_shift": sum(shares.values()) / len(shares) if shares else None,
        **costs(energy_report(one.traced, plan).after),
        "eyeriss_uj": energy_report(one.traced, plan, model="eyeriss").after.energy_mj * 1000,
    }


def costs(cost: Cost) -> dict[str, Any]:
    """Operations by kind, microjoules by the rule `count`, bytes of linear weights."""
    kinds = {kind: cost.ops.total(kind) for kind in ("mul", "add", "shift")}
    return {**kinds, "count_uj": cost.energy_mj * 1000, "weight_bytes": cost.weight_bytes}


def to_shift(result: Result, images: Tensor) -> dict[str, float]:
    """Layer -> share of the tokens that its router sends to the shift expert."""
    with Balance(result.model) as balance, torch.no_grad():
        result.model(images)
        return {layer: share["shift"] for layer, share in balance.shares().items()}


def with_shares(plan: Plan, shares: Mapping[str, float]) -> Plan:
    """The plan with latencies under which the counting rule sends these shares to the shifts."""

    def latencies(share: float) -> list[float]:
        return [max(share, 1e-6), max(1 - share, 1e-6)]

    changed = {
        layer: replace(choice, config={**choice.config, "latencies": latencies(shares[layer])})
        if layer in shares
        else choice
        for layer, choice in plan.linears.items()
    }
    return replace(plan, linears=changed)


def artifact_of(subject: Subject, stage: Stage) -> Path:
    return weights_of(subject, stage.name).with_suffix(".rwa")


def timed(subject: Subject, wanted: Sequence[Stage]) -> dict[str, dict[str, float]]:
    """Times of one image on one thread, all rows by turns in one process.

    The ratio is to the first row (softmax), by round; its spread is the middle half.
    """
    image = digits()[2][0][:1].numpy()
    opened = {s.name: load(artifact_of(subject, s), threads=1) for s in wanted}
    seconds: dict[str, list[float]] = {name: [] for name in opened}
    draw = random.Random(0)
    for turn in range(ROUNDS + 5):
        for name in draw.sample(list(opened), len(opened)):
            best = min(_once(opened[name], image) for _ in range(CALLS))
            if turn >= 5:
                seconds[name].append(best)
    for artifact in opened.values():
        artifact.close()
    first = seconds[wanted[0].name]
    made = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, first, strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        made[name] = {
            "ms": median(values) * 1000, "ratio": middle, "ratio_low": low, "ratio_high": high,
        }  # fmt: skip
    return made


def _once(artifact: Any, image: Any) -> float:
    start = time.perf_counter()
    artifact(image)
    return time.perf_counter() - start


def b0() -> list[dict[str, Any]]:
    """PVT v2 B0 of 1000 classes at 224 pixels, not trained: operations and energy by the rule."""
    loaded = load_model("pvt_v2_b0", image=224)
    traced, found = find_sites(loaded.model, loaded.example_inputs)
    layers = "pvt_v2.encoder*"
    made = [{"row": "as it is", **costs(energy_report(traced, Plan({})).before)}]
    for name, form, linear in (
        ("softmax on all tokens", "msa", None), ("hamming", "hamming", None),
        ("shiftadd", "shiftadd", None), ("shiftadd + shift", "shiftadd", f"shift,{layers}"),
        ("shiftadd + moe", "shiftadd", {layers: "moe"}),
    ):  # fmt: skip
        report = energy_report(traced, make_plan(found, form=form), linear=linear)
        made.append({"row": name, **costs(report.after)})
    return made
