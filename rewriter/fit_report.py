"""FitReport and Recipe: what a fit did, as plain data, and the numbers it goes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from passes.errors import UsageError
from rewriter.fidelity import Fidelity

TRAIN = ("forms", "projections", "layers")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """How a fit spends its time; the defaults serve encoders on a few cores for minutes.

    Shares are of the whole budget; the end-to-end stage gets what is left. Step limits
    make a fit the same on every machine (time then only stops it early); 0: only time counts.
    `train` says what is trained besides the forms: "forms" nothing, "projections" the q, k, v and
    output projections of the rewritten sites, "layers" also, in the end-to-end stage, every float
    parameter of the graph but embedding tables. `precision` is that of the products of the block
    and end-to-end stages: "auto" is bfloat16 where the processor has instructions for it.
    """

    site_share: float = 0.06
    sequential_share: float = 0.0
    block_share: float = 0.4
    site_lr: float = 5e-2
    block_form_lr: float = 1e-2
    block_weight_lr: float = 5e-4
    form_lr: float = 1e-3
    weight_lr: float = 5e-5
    scales: tuple[float, ...] = (1.0, 2.0, 3.0)
    site_steps: int = 0
    block_steps: int = 0
    end_steps: int = 0
    tokens: int = 512
    capture_bytes: int = 384 << 20
    cache_bytes: int = 1 << 30
    save_every: float = 8.0
    train: str = "layers"
    precision: str = "auto"
    refit: bool = True

    def __post_init__(self) -> None:
        if self.train not in TRAIN:
            raise UsageError(f"train: {self.train!r} is not one of {', '.join(TRAIN)}")
        if self.precision not in PRECISIONS:
            told = ", ".join(PRECISIONS)
            raise UsageError(f"precision: {self.precision!r} is not one of {told}")
        if not 0 <= self.site_share + self.sequential_share + self.block_share < 1:
            raise UsageError("the shares of sites, sequence and blocks must leave time")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "scales": list(self.scales)}


@dataclass(frozen=True)
class SiteFit:
    """One rewritten site: errors against the softmax it stands for, on the original's inputs.

    `error_*` is the relative error of the attention output; `divergence_*` the mean KL
    divergence of its weight rows (nats). `projection` is the relative error of the following
    projection before and after its refit, on the rewritten model's own inputs; None if it was
    not refitted, and then `note` says why.
    """

    id: str
    form: str
    error_before: float
    error_after: float
    divergence_before: float
    divergence_after: float
    projection: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Stage:
    """One stage of the fit: how long it took and its loss before and after."""

    name: str
    site: str
    seconds: float
    steps: int
    loss_before: float
    loss_after: float
    skipped: int = 0


@dataclass(frozen=True)
class Revert:
    """A site that got its softmax back: how much better 1 - cosine_mean became by it."""

    id: str
    why: str
    gain: float


@dataclass(frozen=True)
class FitReport:
    """What `fit` did. `fidelity_before` is unfitted, `fidelity` is what was left, both held out."""

    sites: tuple[SiteFit, ...]
    stages: tuple[Stage, ...]
    fidelity_before: Fidelity
    fidelity: Fidelity
    reverted: tuple[Revert, ...]
    seconds: float
    cpu_seconds: float
    seed: int
    resumed: int = 0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FitReport:
        """Inverse of `to_json` (also after a trip through JSON text)."""
        made = dict(data)
        made["sites"] = tuple(_site(s) for s in data["sites"])
        made["stages"] = tuple(Stage(**s) for s in data["stages"])
        made["reverted"] = tuple(Revert(**r) for r in data["reverted"])
        made["notes"] = tuple(data["notes"])
        for name in ("fidelity_before", "fidelity"):
            made[name] = Fidelity.from_json(data[name])
        return cls(**made)


def _site(data: Mapping[str, Any]) -> SiteFit:
    pair = data.get("projection")
    return SiteFit(**{**data, "projection": None if pair is None else (pair[0], pair[1])})
