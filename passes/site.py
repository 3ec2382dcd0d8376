"""AttentionSite, Mask, Dims, NearMiss: what was found in a graph.

Letters used everywhere: B batch, H query heads, G key/value heads (H % G == 0), T query tokens,
S key tokens, D head width of query and key, E head width of value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

Dim = int | str


class SiteStatus(StrEnum):
    """What happened to a site; every site of a report has exactly one."""

    FOUND = "FOUND"
    REWRITTEN = "REWRITTEN"
    KEPT = "KEPT"
    REFUSED = "REFUSED"
    REVERTED = "REVERTED"
    FAILED = "FAILED"
    NEAR_MISS = "NEAR_MISS"


@dataclass(frozen=True)
class Dims:
    """Sizes of one attention; a `str` is the name of a dynamic dimension."""

    B: Dim
    H: int
    G: int
    T: Dim
    S: Dim
    D: int
    E: int

    def static(self, sizes: Mapping[str, int]) -> Dims:
        """The same dims with every name replaced by its value in `sizes`."""
        values = {k: sizes[v] if isinstance(v, str) else v for k, v in asdict(self).items()}
        return Dims(**values)


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see, as independent facts.

    `window` is (left, right): query i sees keys i-left .. i+right; None stands for no window.
    `bias` means the mask tensor is a general additive (or boolean) tensor that must be applied
    as it is (T5, Swin). `unknown` means the mask could not be understood; only the exact form
    takes it, as a tensor. `relative` tells what a bias is known to depend on, besides hidden keys:
    (w,) on j - i alone, with one number on each side from a distance of w on; (h, w) on the
    difference of the cells of a grid of h by w tokens. It is a finding, not a part of equality.
    """

    causal: bool = False
    padding: bool = False
    window: tuple[int, int] | None = None
    bias: bool = False
    unknown: bool = False
    relative: tuple[int, ...] | None = field(default=None, compare=False)

    @property
    def kind(self) -> str:
        """One word (or words joined by +): none, causal, padding, window, bias, unknown."""
        words = [w for w in ("causal", "padding", "bias", "unknown") if getattr(self, w)]
        if self.window is not None:
            words.append("window")
        return "+".join(words) or "none"


@dataclass(frozen=True)
class AttentionSite:
    """One softmax attention of a traced graph.

    `id` is the module path and an ordinal ("encoder.layer.0.attention.self#0") and survives a
    re-trace; `node` is the graph's own name for the SDPA node and does not. `cross` says that keys
    and queries are made from different activations (a decoder over an encoder's output); keys that
    are a reduced copy of the queries' own tokens (T != S) are not cross. `reduced` says that they
    are such a copy, made by a convolution or pooling (passes/rewire.py can take it out), `shared`
    that the keys are the queries themselves.
    """

    id: str
    node: str
    dims: Dims
    dtype: str
    scale: float
    mask: Mask
    cross: bool = False
    dropout: float = 0.0
    source: str = ""
    found_by: str = "sdpa"
    reduced: bool = False
    shared: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data; `mask` is the kind in words, `mask_facts` the fields."""
        data = asdict(self)
        data["mask_facts"] = data.pop("mask")
        data["mask"], data["causal"] = self.mask.kind, self.mask.causal
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttentionSite:
        """Inverse of `to_json`."""
        fields = dict(data)
        facts = dict(fields.pop("mask_facts"))
        for name in ("window", "relative"):
            if facts.get(name) is not None:
                facts[name] = tuple(facts[name])
        fields["mask"], fields["dims"] = Mask(**facts), Dims(**fields["dims"])
        names = set(cls.__dataclass_fields__)
        return cls(**{k: v for k, v in fields.items() if k in names})


@dataclass(frozen=True)
class NearMiss:
    """A place that looks like attention but was not matched, and why."""

    node: str
    reason: str
    source: str = ""
    module_path: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "status": str(SiteStatus.NEAR_MISS)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NearMiss:
        """Inverse of `to_json`."""
        return cls(**{k: data[k] for k in cls.__dataclass_fields__})
