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
BF16 = Variant("ours-bf16", {"form": "exact", "precision": "bf16"})
INT8 = Variant("ours-int8", {"form": "exact", "precision": "int8"})
HEDGEHOG_BF16 = Variant("ours-hedgehog-bf16", {"form": "hedgehog", "precision": "bf16"})


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


def _text(model: str, tokens: int, *more: Variant, batch: int = 1, seconds: float = 70) -> Workload:
    name = f"{model}-{tokens}" + (f"-batch{batch}" if batch > 1 else "")
    load = {"tokens": tokens, "batch": batch}
    return Workload(name, model, load, tokens, (EXACT, HEDGEHOG, *more), seconds=seconds)


def _image(model: str, side: int, patch: int, *more: Variant, seconds: float = 70) -> Workload:
    variants = (EXACT, HEDGEHOG, *more)
    tokens = (side // patch) ** 2
    return Workload(f"{model}-{side}px", model, {"image": side}, tokens, variants, seconds=seconds)


WORKLOADS: tuple[Workload, ...] = (
    _text("minilm", 16, BF16),
    _text("minilm", 128, BF16),
    _text("minilm", 512, BF16, INT8),
    _text("minilm", 128, batch=8),
    _text("bert-base", 512, seconds=110),
    _image("deit-tiny", 224, 16),
    _image("deit-tiny", 512, 16),
    _image("deit-tiny", 1024, 16, BF16, HEDGEHOG_BF16, seconds=170),
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
