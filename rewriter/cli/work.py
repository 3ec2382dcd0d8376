"""What several verbs do: rewrite, fit, verify, read a report."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import NothingRewritten, UsageError
from rewriter.cli.options import parse_config, parse_rules
from rewriter.cli.output import errors

if TYPE_CHECKING:
    from codegen.target import Target
    from passes.form import Form
    from rewriter.api import Result
    from rewriter.energy import EnergyReport
    from rewriter.loaded import LoadedModel
    from rewriter.report import RewriteReport

Names = list[str] | None


def any_plan(form: str | None, plan: Path | None, rules: Names) -> bool:
    """Whether the user said what to put in."""
    return bool(form or plan or rules)


def chosen_form(form: str | None, settings: Names) -> Form | None:
    """The form named by --form with the options of --set."""
    from passes.form import form_named

    config = parse_config(settings)
    if form is None:
        if config:
            raise UsageError("--set needs --form: it sets options of that form")
        return None
    return form_named(form, config)


def rewrite_model(
    loaded: LoadedModel,
    form: str | None,
    plan: Path | None,
    rules: Names,
    settings: Names,
    *,
    allow_none: bool,
    linear: Names = None,
    target: str | Target = "cpu",
) -> Result:
    """Rewrite without fitting; fidelity will be measured on real text where there is any."""
    from rewriter.api import rewrite
    from rewriter.samples import few_held_out

    return rewrite(
        loaded.model,
        loaded.example_inputs,
        form=chosen_form(form, settings),
        plan=plan,
        rules=parse_rules(rules),
        linear=linear or None,
        held_out=few_held_out(loaded),
        on_noop="ok" if allow_none else "error",
        name=loaded.name,
        target=target,
    )


def fit_model(
    loaded: LoadedModel,
    form: str | None,
    plan: Path | None,
    rules: Names,
    settings: Names,
    *,
    seconds: float,
    data: Path | None,
    max_drop: float | None,
    state: Path | None,
    linear: Names = None,
    target: str | Target = "cpu",
) -> Result:
    """Rewrite and fit, with a progress bar on stderr; Ctrl-C keeps the state."""
    from passes.plan import Plan
    from rewriter.api import (
        apply_plan,
        convert_result,
        find_sites,
        fit_result,
        make_plan,
        why_nothing,
    )
    from rewriter.samples import samples_for

    chosen = chosen_form(form, settings)
    traced, found = find_sites(loaded.model, loaded.example_inputs, dynamic_shapes="auto")
    if linear and not any_plan(form, plan, rules):
        made = Plan({})
    else:
        made = make_plan(found, form=chosen, plan=plan, rules=parse_rules(rules))
    more = bool(linear or made.linears)
    if not made.rewritten and not more:
        raise NothingRewritten(why_nothing(found, made))
    fit_on, held_out = samples_for(loaded, data, dynamic=bool(traced.dynamic))
    result = apply_plan(traced, found, made, loaded.name, held_out)
    if not seconds and max_drop is None and not more:
        return result
    with progress_bar("fit") as progress:
        try:
            if made.rewritten and (seconds or max_drop is not None):
                share = seconds / 2 if more else seconds
                fit_result(
                    result, share, fit_on, max_drop=max_drop, state_dir=state, progress=progress
                )
            if more:
                convert_result(
                    result,
                    linear or None,
                    fit_on,
                    seconds=seconds,
                    target=target,
                    progress=progress,
                )
        except KeyboardInterrupt as stop:
            kept = f"The fit is kept in {state}; the same command goes on from there."
            raise KeyboardInterrupt(kept if state is not None else "") from stop
    return result


def check_budget(option: str, seconds: float, max_drop: float | None, *, least: float) -> None:
    """`UsageError` for a time or drop that makes no sense, before the model is even opened."""
    if not math.isfinite(seconds) or seconds < least:
        raise UsageError(f"{option}: must be a number of seconds from {least:g}, got {seconds}")
    if max_drop is not None and not 0 <= max_drop <= 2:
        raise UsageError(f"--max-drop: must be from 0 to 2 (1 - mean cosine), got {max_drop}")


def from_folder(loaded: LoadedModel, folder: Path) -> Result:
    """The rewritten model saved in `folder`."""
    from rewriter.folder import load_rewritten

    return load_rewritten(loaded.model, loaded.example_inputs, folder, name=loaded.name)


@contextmanager
def progress_bar(what: str) -> Iterator[Any]:
    """A callable for the long work, drawing a bar with an estimate on stderr."""
    from rewriter.progress import shown

    with shown(what, errors) as progress:
        yield progress


def verify_file(
    artifact: Path, model: str, source: Path | None, threads: int | None, attn: str
) -> dict[str, Any]:
    """An artifact against its rewritten model, and against the original."""
    from passes.plan import Plan
    from rewriter.api import load, rewrite
    from rewriter.cli.decode_work import model_for
    from rewriter.pipeline import example_inputs

    opened = load(artifact, threads=threads)
    loaded, compare = model_for(opened, model, attn)
    if source is not None:
        result = from_folder(loaded, source)
    else:
        plan = Plan.from_json(opened.manifest.plan, f"plan in {artifact}")
        result = rewrite(loaded.model, loaded.example_inputs, plan=plan, on_noop="ok")
    inputs = example_inputs(result)
    to_original = compare(opened, result.traced.module, inputs)
    outcome: dict[str, Any] = {"original": to_original.to_json()}
    lines = [f"against the original: cosine at least {to_original.cosine_min:.4f} (a measurement)"]
    fitted = bool(opened.report.get("fit"))
    if fitted and source is None:
        lines.append(
            "against the rewritten model: needs --from FOLDER, since weights were fitted or "
            "calibrated on data"
        )
        return {**outcome, "rewritten": None, "ok": True, "lines": lines}
    stats = compare(opened, result.model, inputs)
    verdict = "equal within tolerance" if stats.ok else f"NOT equal: {stats.why}"
    lines.insert(0, f"against the rewritten model: {verdict}, largest error {stats.max_abs:.2e}")
    return {**outcome, "rewritten": stats.to_json(), "ok": stats.ok, "lines": lines}


def read_report(subject: Path) -> RewriteReport:
    """The report in an artifact (its code is not loaded), a rewritten folder or a JSON file."""
    from codegen.archive import open_artifact
    from rewriter.report import RewriteReport

    if subject.is_dir():
        return RewriteReport.load(subject / "report.json")
    if subject.suffix == ".rwa":
        return RewriteReport.from_json(open_artifact(subject).report, f"report in {subject}")
    return RewriteReport.load(subject)


def energy_of(
    loaded: LoadedModel,
    form: str | None,
    plan: Path | None,
    rules: Names,
    settings: Names,
    model: str,
    linear: Names = None,
) -> EnergyReport:
    """The energy of a model as it is and, where a plan is given, rewritten."""
    from passes.plan import Plan
    from rewriter.api import find_sites, make_plan
    from rewriter.energy import energy_report

    traced, found = find_sites(loaded.model, loaded.example_inputs)
    chosen = chosen_form(form, settings)
    planned = Plan({})
    if any_plan(form, plan, rules):
        planned = make_plan(found, form=chosen, plan=plan, rules=parse_rules(rules))
    return energy_report(traced, planned, name=loaded.name, model=model, linear=linear)
