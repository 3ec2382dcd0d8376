"""Plan: which form each site gets, as data that can be saved, edited by hand and re-applied."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from passes.errors import PlanError, UnmatchedRule
from passes.form import Form, form_named
from passes.site import AttentionSite, SiteStatus

SCHEMA = 1
KEEP = "keep"


@dataclass(frozen=True)
class Choice:
    """What one site gets: a form's name, or ``keep``; `status` and `why` go to the report."""

    form: str
    config: Mapping[str, Any] = field(default_factory=dict)
    status: SiteStatus = SiteStatus.REWRITTEN
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "form": self.form,
            "config": dict(self.config),
            "status": str(self.status),
            "why": self.why,
        }


@dataclass(frozen=True)
class Plan:
    """Site id -> Choice, in the order of the graph; and the same for linear layers by id."""

    choices: Mapping[str, Choice]
    linears: Mapping[str, Choice] = field(default_factory=dict)

    def __getitem__(self, site_id: str) -> Choice:
        return self.choices[site_id]

    @property
    def rewritten(self) -> list[str]:
        """Ids of the sites that get another form."""
        return [s for s, c in self.choices.items() if c.status is SiteStatus.REWRITTEN]

    def with_choice(self, site_id: str, choice: Choice) -> Plan:
        """The same plan with one site changed."""
        return replace(self, choices={**self.choices, site_id: choice})

    def to_json(self) -> dict[str, Any]:
        """Plain data with a schema version."""
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "sites": {s: c.to_json() for s, c in self.choices.items()},
        }
        if self.linears:
            data["linears"] = {layer: c.to_json() for layer, c in self.linears.items()}
        return data

    @classmethod
    def from_json(cls, data: Any, name: str = "plan") -> Plan:
        """Inverse of `to_json`; `PlanError` says what is wrong with hand-edited data."""
        if not isinstance(data, Mapping) or not isinstance(data.get("sites"), Mapping):
            raise PlanError(f'{name}: expected an object with "schema" and "sites"')
        if data.get("schema") != SCHEMA:
            raise PlanError(f"{name}: schema {data.get('schema')!r} is not {SCHEMA}")
        linears = data.get("linears", {})
        if not isinstance(linears, Mapping):
            raise PlanError(f'{name}: "linears" must be an object from layer to form')
        return cls(
            {s: _choice(name, s, c) for s, c in data["sites"].items()},
            {layer: _choice(name, layer, c) for layer, c in linears.items()},
        )

    def save(self, path: Path) -> None:
        """Write as JSON, beside and then renamed; `PlanError` if it can not be written."""
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            beside.write_text(json.dumps(self.to_json(), indent=2) + "\n")
            beside.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise PlanError(f"plan {path}: can not be written ({error.strerror})") from error

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a saved plan."""
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise PlanError(f"plan {path}: can not be read ({error.strerror})") from error
        except ValueError as error:
            raise PlanError(f"plan {path}: not JSON ({error})") from error
        return cls.from_json(data, f"plan {path}")


def _choice(name: str, site: str, raw: Any) -> Choice:
    if isinstance(raw, str):
        raw = {"form": raw}
    if not isinstance(raw, Mapping) or not isinstance(raw.get("form"), str):
        raise PlanError(f'{name}: site {site!r} needs a "form" (a name, or "{KEEP}")')
    status = raw.get("status", SiteStatus.KEPT if raw["form"] == KEEP else SiteStatus.REWRITTEN)
    try:
        status = SiteStatus(status)
    except ValueError as error:
        raise PlanError(f"{name}: site {site!r} has an unknown status {status!r}") from error
    config = raw.get("config") or {}
    if not isinstance(config, Mapping):
        raise PlanError(f'{name}: site {site!r}: "config" must be an object')
    return Choice(raw["form"], dict(config), status, str(raw.get("why", "")))


def choose(form: Form, site: AttentionSite, why: str) -> Choice:
    """`form` at `site`, or KEEP with the form's own reason."""
    verdict = form.applies(site)
    if not verdict:
        return Choice(KEEP, {}, SiteStatus.REFUSED, f"{form.name}: {verdict}")
    return Choice(form.name, form.config.to_json(), SiteStatus.REWRITTEN, why)


def plan_by_rules(
    sites: Sequence[AttentionSite], rules: Mapping[str, str | Form], default: str = KEEP
) -> Plan:
    """Plan from {pattern of site id or module path: form name}; the first match wins.

    A pattern is a shell glob ("encoder.layer.[0-3].*", "*"). `UnmatchedRule` if a pattern
    matches no site.
    """
    resolved = {
        pattern: None if form == KEEP else form_named(form) if isinstance(form, str) else form
        for pattern, form in {**rules, "": default}.items()
    }
    matched: set[str] = set()
    choices: dict[str, Choice] = {}
    for site in sites:
        hits = [p for p in rules if fnmatch.fnmatchcase(site.id, p) or site.id.split("#")[0] == p]
        matched.update(hits)
        pattern = hits[0] if hits else ""
        form = resolved[pattern]
        why = f"rule {pattern!r}" if hits else "no rule"
        if form is not None and pattern == "*":
            spared = form.spares(site, sites)
            form, why = (None, f"{form.name}: {spared}") if spared else (form, why)
        keep = Choice(KEEP, {}, SiteStatus.KEPT, why)
        choices[site.id] = keep if form is None else choose(form, site, why)
    _check_rules(rules, matched, sites)
    return Plan(choices)


def _check_rules(
    rules: Mapping[str, str | Form], matched: set[str], sites: Sequence[AttentionSite]
) -> None:
    for pattern in rules:
        if pattern not in matched:
            ids = ", ".join(s.id for s in sites) or "none at all"
            raise UnmatchedRule(f"plan rule {pattern!r} matches no site; the sites are: {ids}")


def bind_plan(plan: Plan, sites: Sequence[AttentionSite]) -> Plan:
    """A saved plan applied to a (re-)trace: every named site must exist; others are kept.

    Every form is asked again, so a plan made for another mask is refused with a reason.
    """
    by_id = {s.id: s for s in sites}
    for site_id in plan.choices:
        if site_id not in by_id:
            ids = ", ".join(by_id) or "none at all"
            raise UnmatchedRule(
                f"plan names site {site_id!r}, which this model does not have: {ids}"
            )
    bound: dict[str, Choice] = {}
    for site in sites:
        choice = plan.choices.get(site.id, Choice(KEEP, {}, SiteStatus.KEPT, "not in the plan"))
        if choice.form != KEEP:
            choice = choose(form_named(choice.form, choice.config), site, choice.why or "plan")
        elif choice.status is SiteStatus.REWRITTEN:  # edited by hand to keep
            choice = replace(choice, status=SiteStatus.KEPT)
        bound[site.id] = choice
    return Plan(bound, plan.linears)
