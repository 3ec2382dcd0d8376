"""From how many tokens on is a form faster than exact attention, on this machine?

Each form is compiled alone at one site (its projections and the rest of a model are not in it)
and takes turns with exact attention, length by length.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from passes.errors import LoweringError, UsageError
from passes.form import Form, form_named
from passes.site import AttentionSite, Dims, Mask
from rewriter.record import read_rows, write_rows
from rewriter.timings import machine

if TYPE_CHECKING:
    from codegen.kit_build import Running
    from codegen.target import Target

SCHEMA = 3
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
FEWEST, MOST = 5, 50  # turns at one length
BUDGET = 2.5  # seconds of turns at one length, where there are more than the fewest
LEVEL = 0.05  # times that differ by less than this share are not told apart
LONGEST = 1.6  # seconds of one run; after it no longer length is measured
Progress = Callable[..., None]


@dataclass(frozen=True)
class Shape:
    """One site: batch 1, heads, head width, causal or not."""

    heads: int = 4
    width: int = 64
    causal: bool = False

    def site(self, tokens: int) -> AttentionSite:
        """The site with this many queries and keys."""
        dims = Dims(1, self.heads, self.heads, tokens, tokens, self.width, self.width)
        mask = Mask(causal=self.causal)
        return AttentionSite("site", "site", dims, "float32", self.width**-0.5, mask)


@dataclass(frozen=True)
class Curve:
    """Seconds of one form and of exact attention beside it, by tokens.

    `growth` is the exponent between the two longest lengths (1 is linear). `break_even` is the
    number of tokens from which the form is faster: interpolated, 0 if it always was, None if
    it is not faster by `LEVEL` at the longest length. `why` says why there is nothing.
    """

    form: str
    seconds: Mapping[int, float] = field(default_factory=dict)
    exact: Mapping[int, float] = field(default_factory=dict)
    why: str = ""

    @property
    def growth(self) -> float | None:
        """log(time ratio) / log(length ratio) of the two longest lengths."""
        if len(self.seconds) < 2:
            return None
        (a, ta), (b, tb) = sorted(self.seconds.items())[-2:]
        return math.log(tb / ta) / math.log(b / a)

    @property
    def break_even(self) -> int | None:
        """Tokens from which on this form is the faster one."""
        points = sorted((n, self.seconds[n] / self.exact[n]) for n in self.seconds)
        if not points or points[-1][1] > 1 - LEVEL:
            return None
        slower = [i for i, (_, ratio) in enumerate(points) if ratio >= 1]
        if not slower:
            return 0
        (a, ra), (b, rb) = points[slower[-1]], points[slower[-1] + 1]
        share = math.log(ra) / (math.log(ra) - math.log(rb))
        return round(math.exp(math.log(a) + share * (math.log(b) - math.log(a))))

    @property
    def level(self) -> bool:
        """Is it, at the longest length, neither faster nor slower than exact attention?"""
        longest = max(self.seconds, default=0)
        return bool(longest) and abs(self.seconds[longest] / self.exact[longest] - 1) <= LEVEL

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "growth": self.growth, "break_even": self.break_even}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curve:
        """Inverse of `to_json`."""
        mine, theirs = (
            {int(n): float(s) for n, s in data[k].items()} for k in ("seconds", "exact")
        )
        return cls(str(data["form"]), mine, theirs, str(data["why"]))


def break_even(
    forms: Sequence[str],
    target: Target,
    *,
    shape: Shape | None = None,
    lengths: Sequence[int] = LENGTHS,
    record: Path | None = None,
    progress: Progress | None = None,
) -> list[Curve]:
    """Time every form against exact attention at every length.

    Args:
        forms: names; target: must run on this machine (a processor).
        shape: of the site; lengths: numbers of tokens, ascending.
        record: a JSON file written after every form, and gone on from.
        progress: called as progress(form, done, total).

    Raises:
        UnknownName: no such form. UsageError: bad lengths, a target that can not run here, or a
        record of other settings.
    """
    shape = shape or Shape()
    if target.kind != "cpu":
        raise UsageError(f"--break-even: measures on this machine; {target.name} is not a cpu")
    if not lengths or list(lengths) != sorted({n for n in lengths if n >= 2}):
        raise UsageError(f"lengths: give ascending numbers of tokens from 2, got {list(lengths)}")
    for name in forms:
        form_named(name)
    from codegen.kit_build import pool_threads

    key: dict[str, Any] = {
        "shape": asdict(shape),
        "lengths": list(lengths),
        "target": target.to_json(),
    }
    key |= {"machine": machine(), "threads": pool_threads()}
    head = {"schema": SCHEMA, "key": key}
    done = {c.form: c for c in read_rows(record, head, "curves", Curve.from_json, "forms")}
    exact: dict[int, Running] = {}  # built once for each length
    for index, name in enumerate(forms):
        if progress is not None:
            progress(name, index, len(forms))
        if name not in done:
            done[name] = _curve(name, shape, lengths, target, exact)
            write_rows(record, head, "curves", [c.to_json() for c in done.values()])
    return [done[name] for name in forms]


def _curve(
    name: str,
    shape: Shape,
    lengths: Sequence[int],
    target: Target,
    built: dict[int, Running],
) -> Curve:
    form = _reaching(name, lengths[-1])
    verdict = form.applies(shape.site(lengths[0]))
    if not verdict:
        return Curve(name, why=str(verdict))
    seconds: dict[int, float] = {}
    exact: dict[int, float] = {}
    why = ""
    for tokens in lengths:
        try:
            mine = _running(form, shape.site(tokens), target)
            if tokens not in built:
                built[tokens] = _running(form_named("exact"), shape.site(tokens), target)
        except LoweringError as error:
            why = str(error).splitlines()[0]
            break
        seconds[tokens], exact[tokens] = _turns(mine, built[tokens])
        if max(seconds[tokens], exact[tokens]) > LONGEST:
            break
    return Curve(name, seconds, exact, why)


def _reaching(name: str, tokens: int) -> Form:
    """The form with its defaults; a span that it must be told is long enough for `tokens`."""
    form = form_named(name)
    span = form.config.to_json().get("span")
    return form if span is None or span >= tokens else form_named(name, {"span": tokens})


def _running(form: Form, site: AttentionSite, target: Target) -> Running:
    from codegen.kit_build import Running, build_form

    size = (1, site.dims.H, int(site.dims.T), site.dims.D)
    draw = np.random.default_rng(0)
    arrays = {n: draw.standard_normal(size, dtype=np.float32) for n in ("q", "k", "v")}
    params = {n: p.detach().numpy() for n, p in sorted(form.init_params(site).items())}
    return Running(build_form(form, form.spec(site), params, arrays, target), arrays, params)


def _turns(mine: Running, theirs: Running) -> tuple[float, float]:
    """Median seconds of both, taking turns."""
    first = mine() + theirs()
    rounds = min(MOST, max(FEWEST, int(BUDGET / first)))
    pairs = [(mine(), theirs()) for _ in range(rounds)]
    medians = (statistics.median(row) for row in zip(*pairs, strict=True))
    a, b = (float(f"{seconds:.4g}") for seconds in medians)
    return a, b
