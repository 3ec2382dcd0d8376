"""What is timed: models with fixed seeds and shapes, and the variants of our artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PEERS = ("eager", "inductor", "onnxruntime", "openvino-f32", "openvino-default")


@dataclass(frozen=True)
class Variant:
    """One artifact of ours: the row's name and what `rewriter.api.compile` is told."""

    row: str
    options: Mapping[str, Any]


EXACT = Variant("ours", {"form": "exact"})
HEDGEHOG = Variant("ours-hedgehog", {"form": "hedgehog"})


@dataclass(frozen=True)
class Workload:
    """A MODEL with the options of `rewriter.models.load_model`.

    `tokens` is the sequence length the attention sees (for the plot), `peers` False times ours
    alone: eager attention at that length would take minutes.
    """

    name: str
    model: str
    options: Mapping[str, Any]
    tokens: int
    variants: tuple[Variant, ...] = (EXACT, HEDGEHOG)
    peers: bool = True
    seconds: float = field(default=0.0)  # expected for a whole run, for the estimate


def _text(model: str, tokens: int, batch: int = 1, seconds: float = 70) -> Workload:
    name = f"{model}-{tokens}" + (f"-batch{batch}" if batch > 1 else "")
    return Workload(name, model, {"tokens": tokens, "batch": batch}, tokens, seconds=seconds)


def _image(model: str, side: int, patch: int, seconds: float = 70) -> Workload:
    return Workload(
        f"{model}-{side}px", model, {"image": side}, (side // patch) ** 2, seconds=seconds
    )


WORKLOADS: tuple[Workload, ...] = (
    _text("minilm", 16),
    _text("minilm", 128),
    _text("minilm", 512),
    _text("minilm", 128, batch=8),
    _text("bert-base", 512, seconds=110),
    _image("deit-tiny", 224, 16),
    _image("deit-tiny", 512, 16),
    _image("deit-tiny", 1024, 16, seconds=160),
    _image("deit-small", 224, 16, seconds=80),
    _image("pvt_v2_b0", 224, 4, seconds=100),
    _text("gpt2", 1024, seconds=120),
    Workload("deit-tiny-2048px", "deit-tiny", {"image": 2048}, 128 * 128, (HEDGEHOG,), False, 60),
)


def workload_named(name: str) -> Workload:
    """The workload called `name`; KeyError with all names if there is none."""
    for workload in WORKLOADS:
        if workload.name == name:
            return workload
    raise KeyError(f"no workload {name!r}; there are: {', '.join(w.name for w in WORKLOADS)}")
