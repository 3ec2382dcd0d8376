"""The papers' stages on a small scale: what is trained, from which weights, for how long.

First the attention is exchanged and trained, in two parts, then, from those weights, the linear
layers. All learn from the same labelled digits, and softmax may take as many steps as any other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from examples.mnist.data import digits, shifted
from examples.mnist.model import trained as trained_vit
from examples.shiftadd.pvt import pretrained as trained_pvt
from passes.linear_form import linear_form_named
from passes.moe_balance import Balance
from rewriter.api import Result, fine_tune, rewrite
from rewriter.linear_work import convert_linears
from rewriter.outputs import write_text
from rewriter.supervised import Rates

OUT = Path(__file__).parents[2] / "out" / "shiftadd"
BATCH, COPIES = 50, 4
TAUGHT_COPIES = 12  # where the original's outputs are learned from: they cost nothing more
LIMIT = 3600.0  # seconds of one stage: steps end it
ROWS = ("softmax", "hamming", "shiftadd", "shiftadd + shift", "shiftadd + moe")
LATER_VIT = dict(zip(ROWS, (4500, 3000, 3000, 1500, 1500), strict=True))
LATER_PVT = dict.fromkeys(ROWS, 1000)
LATENCIES = (6.0, 4.0)  # of product and shift, as published
BALANCE = 0.01  # weight of the loss that balances the experts, as published


@dataclass(frozen=True)
class Subject:
    """One model: where it comes from, what its softmax row is, which linear layers change."""

    name: str
    title: str
    model: Callable[[], nn.Module]
    softmax: str
    layers: str
    steps: int  # of the first part of a row's training
    later: Mapping[str, int]  # of the rest, by row
    rates: tuple[float, float, float]  # of the weights: first part, second, linear layers
    middle: str  # the stage that coded linear layers start from
    before: str = ""  # a stage that all others start from
    taught: bool = False  # whether the later parts learn from the original's outputs too


@dataclass(frozen=True)
class Stage:
    """One training: the form of attention, the linear layers, and whose weights it starts from."""

    name: str
    form: str
    linear: str = ""
    start: str = ""


SUBJECTS = {
    s.name: s
    for s in (
        Subject(
            "vit", "ViT", trained_vit, "exact", "blocks.*", 900, LATER_VIT, (1e-3, 5e-4, 2e-4),
            "shiftadd", taught=True,
        ),
        Subject(
            "pvt", "PVT v2, small", lambda: trained_pvt(OUT / "pvt.safetensors"), "msa",
            "net.pvt_v2.*", 1000, LATER_PVT, (4e-4, 2e-4, 2e-4), "shiftadd, half", before="msa",
        ),
    )
}  # fmt: skip


def stages(subject: Subject) -> list[Stage]:
    """In the order in which they are trained; the rows of the table are `rows(subject)`."""
    forms = (("softmax", subject.softmax), ("hamming", "hamming"), ("shiftadd", "shiftadd"))
    made = [Stage(subject.before, subject.before)] if subject.before else []
    made += [Stage(f"{name}, half", form, start=subject.before) for name, form in forms]
    made += [Stage(name, form, start=f"{name}, half") for name, form in forms]
    for linear in ("shift", "moe"):
        made.append(Stage(f"shiftadd + {linear}", "shiftadd", linear, subject.middle))
    return made


def allowed(subject: Subject, row: str) -> int:
    """Steps that a row may take in all its parts."""
    before = subject.middle if "+" in row else ""
    return subject.steps + subject.later.get(before, 0) + subject.later[row]


def rows(subject: Subject) -> list[Stage]:
    """The stages that are shown: those that had all their steps."""
    return [s for s in stages(subject) if s.name != subject.before and "half" not in s.name]


def labelled(x: Tensor, y: Tensor, copies: int = COPIES) -> list[dict[str, Tensor]]:
    """Shuffled batches of moved copies, with labels."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for _ in range(copies):
        order = torch.randperm(len(y), generator=draw)
        moved = shifted(x[order], draw)
        made += [
            {"image": a, "label": b}
            for a, b in zip(moved.split(BATCH), y[order].split(BATCH), strict=True)
        ]
    return made


@torch.no_grad()
def taught(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The batches with the logits of the original model beside the labels."""
    return [{**b, "teacher": model(b["image"])} for b in batches]


def loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the labels; half of it towards the teacher's outputs where there are any."""
    labels = F.cross_entropy(logits, batch["label"], label_smoothing=0.05)
    if "teacher" not in batch:
        return labels
    return (labels + F.cross_entropy(logits, batch["teacher"].softmax(-1))) / 2


def weights_of(subject: Subject, name: str) -> Path:
    return OUT / subject.name / f"{name.replace(', ', '-').replace(' + ', '+')}.safetensors"


def built(subject: Subject, stage: Stage, image: Tensor, *, done: bool) -> Result:
    """The model of a stage for batches like `image`: with its final weights if `done`, else with
    those it starts from."""
    result = rewrite(
        subject.model(), {"image": image}, form=stage.form, on_noop="ok", name=subject.title
    )
    if stage.start and not (done and stage.linear):
        load(result.model, weights_of(subject, stage.name if done else stage.start))
    if stage.linear:
        config = {"latencies": LATENCIES} if stage.linear == "moe" else {}
        convert_linears(result, {subject.layers: linear_form_named(stage.linear, config)})
    if done and (stage.linear or not stage.start):
        load(result.model, weights_of(subject, stage.name))
    return result


@torch.no_grad()
def load(module: nn.Module, path: Path) -> None:
    """Copy the tensors in `path` to where their names and shapes are in `module`."""
    own = dict(module.named_parameters())
    for name, value in load_file(path).items():
        if name in own and own[name].shape == value.shape:
            own[name].copy_(value)


def train(subject: Subject, stage: Stage, progress: Callable[..., None] | None = None) -> None:
    """Train a stage; its weights and, beside them, what the training did are kept in `OUT`."""
    (x, y), (held_x, held_y), _ = digits()
    torch.manual_seed(0)
    result = built(subject, stage, x[:BATCH], done=False)
    first, second, last = subject.rates
    rate, steps = (first, subject.steps)
    if stage.name in subject.later:
        rate, steps = (last if stage.linear else second), subject.later[stage.name]
    rates = Rates(forms=2 * rate, weights=rate, steps=steps)
    learns = subject.taught and stage.name in subject.later
    data = labelled(x, y, TAUGHT_COPIES if learns else COPIES)
    held = labelled(held_x, held_y, copies=1)
    if learns:
        teacher = subject.model().eval()
        data, held = taught(teacher, data), taught(teacher, held)

    def run(objective: Callable[..., Tensor]) -> dict[str, Any]:
        done = fine_tune(
            result, data, objective, seconds=LIMIT, validation=held, rates=rates, refresh=1,
            state_dir=weights_of(subject, stage.name).with_suffix(".state"), progress=progress,
        )  # fmt: skip
        return done.to_json()

    if stage.linear == "moe":
        with Balance(result.model) as balance:
            made = run(lambda out, batch: loss(out, batch) + BALANCE * balance.loss())
    else:
        made = run(loss)
    path = weights_of(subject, stage.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".json"), json.dumps(made) + "\n")
    save(result.model, path)
    shutil.rmtree(path.with_suffix(".state"), ignore_errors=True)


def save(module: nn.Module, path: Path) -> None:
    part = path.with_suffix(".part")
    save_file({n: p.detach().contiguous().clone() for n, p in module.named_parameters()}, part)
    part.replace(path)
