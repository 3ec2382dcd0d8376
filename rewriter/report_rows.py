"""SiteRow, KernelRow and plain-data helpers: what a RewriteReport is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from passes.opcount import OpCount
from passes.site import AttentionSite, SiteStatus

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class SiteRow:
    """One site of a report: what was done, why, what it cost and what it won.

    `verdicts` is {form: {"ok", "code", "detail"}} for every known form. `ops_before` counts the
    exact attention, `ops_after` what stands there now. The errors are relative errors of the
    site's output on held-out data, `ms_*` milliseconds; None is "not measured".
    """

    site: AttentionSite
    status: SiteStatus
    form: str
    why: str = ""
    exact: bool = True
    verdicts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ops_before: OpCount | None = None
    ops_after: OpCount | None = None
    error_before_fit: float | None = None
    error_after_fit: float | None = None
    ms_before: float | None = None
    ms_after: float | None = None

    @property
    def error(self) -> float | None:
        """The site's error as it stands: after the fit, else before it; 0 once reverted."""
        if self.status is SiteStatus.REVERTED:
            return 0.0
        return self.error_before_fit if self.error_after_fit is None else self.error_after_fit

    def to_json(self) -> dict[str, Any]:
        """Plain data: the site's own fields with what happened to it beside them."""
        return {
            **self.site.to_json(),
            "status": str(self.status),
            "form": self.form,
            "why": self.why,
            "exact": self.exact,
            "verdicts": {name: dict(v) for name, v in self.verdicts.items()},
            "ops_before": self.ops_before.to_json() if self.ops_before else None,
            "ops_after": self.ops_after.to_json() if self.ops_after else None,
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SiteRow:
        """Inverse of `to_json`."""
        before, after = data.get("ops_before"), data.get("ops_after")
        return cls(
            site=AttentionSite.from_json(data),
            status=SiteStatus(data["status"]),
            form=data["form"],
            why=data.get("why", ""),
            exact=bool(data.get("exact", True)),
            verdicts=dict(data.get("verdicts", {})),
            ops_before=OpCount.from_json(before) if before else None,
            ops_after=OpCount.from_json(after) if after else None,
            **{name: data.get(name) for name in _NUMBERS},
        )


_NUMBERS = ("error_before_fit", "error_after_fit", "ms_before", "ms_after")


@dataclass(frozen=True)
class KernelRow:
    """One compiled kernel: `scheduled_by` names the rule (or tuned record) that scheduled it."""

    name: str
    scheduled_by: str
    ops: OpCount | None = None
    calls: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        ops = self.ops.to_json() if self.ops else None
        return {
            "name": self.name,
            "scheduled_by": self.scheduled_by,
            "ops": ops,
            "calls": self.calls,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KernelRow:
        """Inverse of `to_json`."""
        ops = OpCount.from_json(data["ops"]) if data.get("ops") else None
        return cls(data["name"], data["scheduled_by"], ops, int(data.get("calls", 1)))

    @classmethod
    def of(cls, kernel: Any) -> KernelRow:
        """From a codegen KernelInfo, a mapping of the same fields, or a KernelRow."""
        if isinstance(kernel, KernelRow):
            return kernel
        if isinstance(kernel, Mapping):
            return cls.from_json(kernel)
        ops = getattr(kernel, "ops", None)
        if isinstance(ops, Mapping):
            ops = OpCount.from_json(ops)
        return cls(kernel.name, kernel.scheduled_by, ops, int(kernel.count))


def encode(data: Any) -> Any:
    """Strict JSON data: NaN and infinities become the words "NaN", "Infinity", "-Infinity"."""
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    if isinstance(data, Mapping):
        return {str(k): encode(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [encode(v) for v in data]
    return data


def decode(data: Any) -> Any:
    """Inverse of `encode`."""
    if isinstance(data, str):
        return _WORDS.get(data, data)
    if isinstance(data, Mapping):
        return {k: decode(v) for k, v in data.items()}
    if isinstance(data, list):
        return [decode(v) for v in data]
    return data


def plain(value: Any) -> Any:
    """`value.to_json()` where there is one, a dict of a mapping, else the value itself."""
    if value is None:
        return None
    if hasattr(value, "to_json"):
        return value.to_json()
    return dict(value) if isinstance(value, Mapping) else value
