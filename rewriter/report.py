"""RewriteReport: what was done to every site, what it cost and what it won, as data.

Exact and approximate are kept apart: `compiled` says how closely the compiled code computes the
rewritten model (a tolerance), `fidelity` how much the rewritten model resembles the original
(a measurement). The report grows by `with_...` along the straight line and is never edited.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import NothingRewritten, UnknownName, UsageError
from passes.plan import KEEP, Choice, Plan
from passes.rewire import rewired
from passes.site import AttentionSite, NearMiss, SiteStatus
from rewriter.outputs import write_text
from rewriter.report_rows import KernelRow, SiteRow, decode, encode, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = 1
DISTRIBUTIONS = ("attention-rewriter", "torch", "apache-tvm", "apache-tvm-ffi", "numpy")
_PLAIN = ("fidelity", "compiled", "fit", "target", "timings", "artifact", "graph", "versions",
          "sizes", "experts")  # fmt: skip


@dataclass(frozen=True)
class RewriteReport:
    """Everything known about one rewritten (and perhaps fitted, compiled, timed) model.

    `fidelity` is rewritten against original, `compiled` compiled against rewritten (ErrorStats),
    `timings` a BenchResult, `graph` the picture data of one block: all as plain data, None or
    empty where it was not measured. `sizes` are the example's values of dynamic dimensions,
    `experts` the times, routing and training of two-expert layers (rewriter/moe_routing.py).
    """

    model: str
    tracer: str = ""
    sites: tuple[SiteRow, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    kernels: tuple[KernelRow, ...] = ()
    fidelity: Mapping[str, Any] | None = None
    compiled: Mapping[str, Any] | None = None
    fit: Mapping[str, Any] | None = None
    target: Mapping[str, Any] | None = None
    timings: Mapping[str, Any] | None = None
    artifact: Mapping[str, Any] | None = None
    graph: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    experts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def start(cls, name: str, traced: Any, found: Any, plan: Plan) -> RewriteReport:
        """The report of a planned rewrite: every site, every form's verdict, operation counts."""
        from rewriter.graph_view import block_graph

        sizes = dynamic_sizes(traced)
        rows = tuple(_row(site, plan, sizes) for site in found.sites)
        shown = next(
            (r for r in rows if r.status is SiteStatus.REWRITTEN), rows[0] if rows else None
        )
        graph = block_graph(traced.module, shown.site, _form(plan, shown)) if shown else None
        return cls(
            model=name,
            tracer=traced.tracer,
            sites=rows,
            near_misses=tuple(found.near_misses),
            graph=graph,
            versions=versions(),
            sizes=sizes,
            notes=(*traced.notes, *_size_note(sizes)),
        )

    def with_plan(self, plan: Plan) -> RewriteReport:
        """The same report after `plan` changed (reverted sites); measurements stay."""
        rows = tuple(_keep_numbers(_row(row.site, plan, self.sizes), row) for row in self.sites)
        return replace(self, sites=rows)

    def with_fit(self, fitted: Any, plan: Plan | None = None) -> RewriteReport:
        """Add a FitReport (or its plain data): per-site errors, fidelity, and the plan it left."""
        data = plain(fitted)
        report = self.with_plan(plan) if plan is not None else self
        by_id = {row["id"]: row for row in data.get("sites", ())}
        rows = tuple(
            replace(
                row,
                error_before_fit=by_id[row.site.id].get("error_before"),
                error_after_fit=by_id[row.site.id].get("error_after"),
            )
            if row.site.id in by_id
            else row
            for row in report.sites
        )
        fidelity = data.get("fidelity") or report.fidelity
        notes = (*report.notes, *data.get("notes", ()))
        return replace(report, sites=rows, fit=data, fidelity=plain(fidelity), notes=notes)

    def with_fidelity(self, fidelity: Any) -> RewriteReport:
        """Add rewritten against original (a Fidelity or plain data)."""
        return replace(self, fidelity=plain(fidelity))

    def with_compiled(
        self,
        stats: Any,
        kernels: Iterable[Any] = (),
        target: Any = None,
        *,
        artifact: Mapping[str, Any] | None = None,
        notes: Iterable[str] = (),
    ) -> RewriteReport:
        """Add compiled against rewritten (ErrorStats), the kernels and the target.

        `stats` is None where the code can not run here (a foreign target).
        """
        return replace(
            self,
            compiled=plain(stats),
            kernels=tuple(KernelRow.of(k) for k in kernels),
            target=plain(target),
            artifact=plain(artifact),
            notes=(*self.notes, *notes),
        )

    def with_timings(self, timings: Any) -> RewriteReport:
        """Add a BenchResult (or its plain data)."""
        return replace(self, timings=plain(timings))

    def with_site_ms(self, ms: Mapping[str, tuple[float, float]]) -> RewriteReport:
        """Add measured milliseconds {site id: (before, after)}."""
        rows = tuple(
            replace(r, ms_before=ms[r.site.id][0], ms_after=ms[r.site.id][1])
            if r.site.id in ms
            else r
            for r in self.sites
        )
        return replace(self, sites=rows)

    def with_linear_fit(self, **facts: Any) -> RewriteReport:
        """Add what was fitted of linear layers (`calibrated` ids, `trained` stages) to `fit`."""
        known = self.fit or {}
        return replace(self, fit={**known, "linears": {**known.get("linears", {}), **facts}})

    def with_experts(self, **facts: list[Any]) -> RewriteReport:
        """Add facts of two-expert layers: times, routing, image, training; [] adds nothing."""
        found = {name: rows for name, rows in facts.items() if rows}
        return replace(self, experts={**self.experts, **found})

    def with_notes(self, *notes: str) -> RewriteReport:
        """Add sentences the reader must know."""
        return replace(self, notes=(*self.notes, *notes))

    @property
    def sites_found(self) -> int:
        """How many attention sites the model has."""
        return len(self.sites)

    @property
    def sites_rewritten(self) -> int:
        """How many of them have another form now."""
        return sum(row.status is SiteStatus.REWRITTEN for row in self.sites)

    @property
    def approximate(self) -> tuple[SiteRow, ...]:
        """The sites whose function is approximated now; all others compute what they did."""
        return tuple(row for row in self.sites if not row.exact)

    @property
    def compiled_max_abs_error(self) -> float | None:
        """Largest absolute error of the compiled code against the rewritten model."""
        return None if self.compiled is None else self.compiled.get("max_abs")

    def times(self) -> dict[str, float]:
        """Median milliseconds by engine, of the engines that ran."""
        rows = (self.timings or {}).get("engines", ())
        return {r["engine"]: r["median_ms"] for r in rows if r.get("median_ms") is not None}

    @property
    def faster(self) -> bool | None:
        """Whether the artifact beat eager PyTorch in the same run; None where not measured."""
        times = self.times()
        if "ours" not in times or "eager" not in times:
            return None
        return bool(times["ours"] < times["eager"])

    @property
    def beaten_by(self) -> tuple[str, ...]:
        """Engines that were as fast as the artifact or faster, fastest first."""
        times = self.times()
        ours = times.pop("ours", None)
        if ours is None:
            return ()
        return tuple(sorted((e for e, ms in times.items() if ms <= ours), key=times.__getitem__))

    def site(self, site_id: str) -> SiteRow:
        """The row of one site; `UnknownName` with near names if there is none."""
        for row in self.sites:
            if row.site.id == site_id:
                return row
        raise UnknownName("site", site_id, [row.site.id for row in self.sites])

    def explain(self, site_id: str) -> str:
        """Some lines of text: what happened to the site, why, and every form's verdict."""
        from rewriter.wording import explain

        return explain(self.site(site_id))

    def require(self, n: int) -> RewriteReport:
        """This report, if at least `n` sites were rewritten; else `NothingRewritten` says why."""
        if self.sites_rewritten >= n:
            return self
        lines = [f"  {r.site.id}: {r.status} {r.why}".rstrip() for r in self.sites]
        head = f"rewrote {self.sites_rewritten} of {self.sites_found} sites, {n} were required"
        raise NothingRewritten("\n".join([head, *lines]))

    def summary(self) -> str:
        """A few sentences: what was done, how exact, how alike, how fast."""
        from rewriter.wording import summary

        return summary(self)

    def table(self) -> RenderableType:
        """For a terminal: sites, numbers, kernels and notes (rich)."""
        from rewriter.terminal import report_view

        return report_view(self)

    def to_json(self) -> dict[str, Any]:
        """Plain, strict JSON data; values that are not finite are the words NaN and Infinity."""
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "model": self.model,
            "tracer": self.tracer,
            "summary": self.summary(),
            "sites_found": self.sites_found,
            "sites_rewritten": self.sites_rewritten,
            "sites_approximate": len(self.approximate),
            "compiled_max_abs_error": self.compiled_max_abs_error,
            "faster": self.faster,
            "beaten_by": list(self.beaten_by),
            **{name: plain(getattr(self, name)) for name in _PLAIN},
            "sites": [row.to_json() for row in self.sites],
            "near_misses": [miss.to_json() for miss in self.near_misses],
            "kernels": [row.to_json() for row in self.kernels],
            "notes": list(self.notes),
        }
        coded: dict[str, Any] = encode(data)
        return coded

    @classmethod
    def from_json(cls, data: Any, name: str = "report") -> RewriteReport:
        """Inverse of `to_json`; `UsageError` if `data` is not a report of this version."""
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA or "model" not in data:
            raise UsageError(f"{name}: not a report of this tool (schema {SCHEMA})")
        try:
            raw = decode(dict(data))
            return cls(
                model=str(raw["model"]),
                tracer=raw.get("tracer", ""),
                sites=tuple(SiteRow.from_json(row) for row in raw.get("sites", ())),
                near_misses=tuple(NearMiss.from_json(miss) for miss in raw.get("near_misses", ())),
                kernels=tuple(KernelRow.from_json(row) for row in raw.get("kernels", ())),
                notes=tuple(raw.get("notes", ())),
                **{key: raw.get(key) for key in _PLAIN if raw.get(key) is not None},
            )
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise UsageError(f"{name}: a damaged report ({error!r})") from error

    def save(self, path: Path) -> None:
        """Write as JSON: beside, then rename. `ArtifactError` where it can not be written."""
        write_text(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> RewriteReport:
        """Read a saved report; `UsageError` says what is wrong with the file."""
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise UsageError(f"report {path}: can not be read ({error.strerror})") from error
        except ValueError as error:
            raise UsageError(f"report {path}: not JSON ({error})") from error
        return cls.from_json(data, f"report {path}")

    def to_html(self) -> str:
        """One self-contained page."""
        from rewriter.html import page

        return page(self)

    def save_html(self, path: Path) -> None:
        """Write the page: beside, then rename. `ArtifactError` where it can not be written."""
        write_text(path, self.to_html())


def versions() -> dict[str, str]:
    """Versions of Python and of the distributions a result depends on."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _form(plan: Plan, row: SiteRow) -> Any:
    from passes.form import form_named

    choice = plan.choices.get(row.site.id)
    config = choice.config if choice else {}
    return form_named("exact" if row.form == KEEP else row.form, config)


def _row(site: AttentionSite, plan: Plan, sizes: Mapping[str, int]) -> SiteRow:
    from passes.form import form_named, forms

    choice = plan.choices.get(site.id, Choice(KEEP, {}, SiteStatus.KEPT, "not in the plan"))
    known = forms()
    chosen = form_named("exact" if choice.form == KEEP else choice.form, choice.config)
    verdicts = {name: form().applies(site) for name, form in known.items()}
    return SiteRow(
        site=site,
        status=choice.status,
        form=choice.form,
        why=choice.why,
        exact=chosen.exact,
        verdicts={
            name: {"ok": bool(v), "code": str(v.reason) if v.reason else None, "detail": v.detail}
            for name, v in verdicts.items()
        },
        ops_before=_ops(form_named("exact"), site, sizes),
        ops_after=_ops(chosen, site, sizes),
    )


def dynamic_sizes(traced: Any) -> dict[str, int]:
    """What each named dimension was in the example inputs of a Traced."""
    if not traced.dynamic:
        return {}
    from rewriter.calibration import input_names

    values = [*traced.example_args, *traced.example_kwargs.values()]
    examples = dict(zip(input_names(traced), values, strict=False))
    return {
        word: int(examples[name].shape[axis])
        for name, axes in traced.dynamic.items()
        for axis, word in axes.items()
        if name in examples
    }


def _size_note(sizes: Mapping[str, int]) -> tuple[str, ...]:
    told = ", ".join(f"{name}={n}" for name, n in sizes.items())
    return (f"operations are counted for {told}, as in the example inputs",) if sizes else ()


def _ops(form: Any, site: AttentionSite, sizes: Mapping[str, int]) -> Any:
    """Closed-form count; None where a dynamic dimension's size is not known."""
    try:
        static = replace(site, dims=site.dims.static(sizes))
        return form.ops(rewired(static, form.rewires(static)))
    except KeyError:
        return None


def _keep_numbers(row: SiteRow, old: SiteRow) -> SiteRow:
    return replace(
        row,
        error_before_fit=old.error_before_fit,
        error_after_fit=old.error_after_fit,
        ms_before=old.ms_before,
        ms_after=old.ms_after,
    )
