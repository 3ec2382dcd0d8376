"""The bars: which ratio of medians each workload must reach, as data; and who met them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Compared with exact artifacts in float32: peers that compute in float32 too.
FLOAT32 = ("eager", "inductor", "onnxruntime", "openvino-f32")
BF16 = ("openvino-default",)


@dataclass(frozen=True)
class Bar:
    """median of `row` in `workload` / fastest of `peers` (in `against`, or the same workload)."""

    workload: str
    row: str
    most: float
    peers: tuple[str, ...] = FLOAT32
    against: str = ""


@dataclass(frozen=True)
class Verdict:
    """`ratio` None: a number is missing, and `why` says which."""

    bar: Bar
    ratio: float | None
    peer: str = ""
    why: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None else self.ratio <= self.bar.most

    def words(self) -> str:
        """ "met", or by how much it is missed, or why it is not known."""
        if self.ratio is None:
            return f"not measured ({self.why})"
        return "met" if self.met else f"missed: {self.ratio / self.bar.most:.2f} times the bar"


BARS: tuple[Bar, ...] = (
    Bar("minilm-512", "ours", 0.65),
    Bar("bert-base-512", "ours", 0.65),
    Bar("minilm-128", "ours", 0.85),
    Bar("deit-tiny-224px", "ours", 0.85),
    Bar("gpt2-1024", "ours", 0.85),
    Bar("pvt_v2_b0-224px", "ours", 0.85),
    Bar("deit-tiny-1024px", "ours", 0.65),
    Bar("deit-tiny-1024px", "ours-hedgehog", 0.15),
    Bar("deit-tiny-512px", "ours-hedgehog", 0.60),
    Bar("minilm-512", "ours-bf16", 0.85, BF16),
    Bar("minilm-512", "ours-int8", 0.80, ("ours-bf16",)),
    Bar("deit-tiny-1024px", "ours-hedgehog-bf16", 0.20, BF16),
    Bar("deit-tiny-2048px", "ours-hedgehog", 4.6, ("ours-hedgehog",), "deit-tiny-1024px"),
)


def judge(results: Mapping[str, Mapping[str, Any]], bars: Sequence[Bar] = BARS) -> list[Verdict]:
    """A verdict for each bar; `results` are the JSON of benchmarks/results by workload."""
    return [_judge(bar, results) for bar in bars]


def _judge(bar: Bar, results: Mapping[str, Mapping[str, Any]]) -> Verdict:
    ours = medians(results.get(bar.workload)).get(bar.row)
    if ours is None:
        return Verdict(bar, None, why=f"no time of {bar.row} in {bar.workload}")
    place = bar.against or bar.workload
    found = medians(results.get(place))
    peers = {name: found[name] for name in bar.peers if name in found}
    if not peers:
        return Verdict(bar, None, why=f"no time of {', '.join(bar.peers)} in {place}")
    best = min(peers, key=lambda name: peers[name])
    return Verdict(bar, ours / peers[best], best)


def medians(result: Mapping[str, Any] | None) -> dict[str, float]:
    """Median milliseconds by row; wrong artifacts have none: a fast wrong answer is no answer."""
    rows = (result or {}).get("engines", ())
    return {
        r["engine"]: r["median_ms"]
        for r in rows
        if r.get("median_ms") and r.get("verified", True) is not False
    }
