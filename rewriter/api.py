"""The Python door: rewrite, compile, load, tune. Each only chains the arrows of the straight line.

model -> trace -> canonicalise -> find -> plan -> substitute -> fit -> seal -> frontend -> lower
-> build -> artifact -> verify (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import NothingRewritten, UsageError
from passes.plan import KEEP, Plan, bind_plan, plan_by_rules

if TYPE_CHECKING:
    import torch

    from codegen.runtime import Artifact
    from codegen.target import Target
    from passes.find import Found
    from passes.form import Form
    from passes.substitute import Rewritten
    from passes.traced import Traced
    from rewriter.fit import FitReport
    from rewriter.report import RewriteReport
    from rewriter.session import TuningSession
    from rewriter.supervised import FineTuned

Inputs = Mapping[str, Any] | tuple[Any, ...]
Progress = Callable[..., None]


@dataclass
class Result:
    """A rewritten model with everything known about it; `model` runs and trains."""

    name: str
    traced: Traced
    found: Found
    plan: Plan
    rewritten: Rewritten
    report: RewriteReport
    fitted: FitReport | None = None
    held_out: Sequence[Mapping[str, torch.Tensor]] = ()
    tuned: FineTuned | None = None

    @property
    def model(self) -> torch.fx.GraphModule:
        """The rewritten module: same inputs and outputs as the original, trainable."""
        return self.rewritten.module


def find_sites(
    model: Any, example_inputs: Inputs, *, dynamic_shapes: Any = None
) -> tuple[Traced, Found]:
    """The first three arrows: trace, canonicalise, find."""
    from passes.canonicalise import canonicalise
    from passes.find import find
    from passes.trace import trace

    traced = canonicalise(trace(model, example_inputs, dynamic_shapes=dynamic_shapes))
    return traced, find(traced)


def rewrite(
    model: Any,
    example_inputs: Inputs,
    *,
    form: str | Form | None = None,
    plan: Plan | Path | str | None = None,
    rules: Mapping[str, str | Form] | None = None,
    linear: Any = None,
    fit_seconds: float = 0.0,
    data: Sequence[Mapping[str, torch.Tensor]] | None = None,
    held_out: Sequence[Mapping[str, torch.Tensor]] | None = None,
    max_drop: float | None = None,
    state_dir: Path | None = None,
    dynamic_shapes: Any = None,
    on_noop: str = "error",
    name: str | None = None,
    target: str | Target = "cpu",
    progress: Progress | None = None,
) -> Result:
    """Substitute the attentions of `model` and return it with a report.

    Args:
        model: a torch module (or GraphModule, or ExportedProgram).
        example_inputs: a tuple of tensors, or a dict from forward's argument names.
        form: one form for every site; or
        plan: a Plan, or the path of a saved one; or
        rules: {glob over site ids: form}; the first that matches wins.
        linear: what linear layers become, beside the above or alone: "form", "form,pattern" or
            {glob over layer ids: form} (rewriter/linear_work.py); done after the fit.
        fit_seconds: time budget of the label-free fit; 0 fits nothing.
        data, held_out: batches (dicts like `example_inputs`) to fit on and to measure on.
        max_drop: revert the worst sites until 1 - mean cosine on `held_out` is at most this.
        state_dir: where a killed fit goes on from.
        on_noop: "error" raises NothingRewritten when no site changes; "ok" goes on.
        name: what the report calls the model.
        target: what the experts of `moe` layers are timed for.

    Raises:
        TraceError, NothingRewritten, UnmatchedRule, PlanError, FitError, UsageError.
    """
    if on_noop not in ("error", "ok"):
        raise UsageError(f"on_noop: must be 'error' or 'ok', got {on_noop!r}")
    traced, found = find_sites(model, example_inputs, dynamic_shapes=dynamic_shapes)
    alone = linear is not None and not (form or plan or rules)
    chosen = _keep_all(found) if alone else make_plan(found, form=form, plan=plan, rules=rules)
    more = linear is not None or bool(chosen.linears)
    if not chosen.rewritten and on_noop == "error" and not more:
        raise NothingRewritten(why_nothing(found, chosen))
    result = apply_plan(traced, found, chosen, name or type(model).__name__, held_out or ())
    wanted = bool(fit_seconds or data or max_drop is not None)
    if wanted and (chosen.rewritten or not more):
        fit_result(
            result,
            fit_seconds / 2 if more else fit_seconds,
            data,
            max_drop=max_drop,
            state_dir=state_dir,
            progress=progress,
        )
    if more:
        convert_result(result, linear, data, seconds=fit_seconds, target=target, progress=progress)
    return result


def _keep_all(found: Found) -> Plan:
    return plan_by_rules(found.sites, {})


def convert_result(
    result: Result,
    linear: Any,
    data: Sequence[Mapping[str, torch.Tensor]] | None = None,
    *,
    seconds: float = 0.0,
    target: str | Target = "cpu",
    progress: Progress | None = None,
) -> None:
    """Convert linear layers of a `Result` in place; `seconds` of training where a form needs it.

    After a fit of attention sites half of `seconds` is left for it. The experts of `moe` layers
    are timed for `target`.
    """
    from passes.linear_form import linear_form_named
    from rewriter.linear_train import recover
    from rewriter.linear_work import convert_linears

    convert_linears(result, linear, data, target=target)
    trained = any(
        linear_form_named(c.form, c.config).needs == "training"
        for c in result.plan.linears.values()
        if c.form != KEEP
    )
    if seconds and trained:
        if data is None:
            raise UsageError("fitting needs `data`: batches of model inputs (dicts of tensors)")
        left = seconds / 2 if result.fitted is not None else seconds
        recover(result, data, seconds=left, progress=progress)


def apply_plan(
    traced: Traced,
    found: Found,
    plan: Plan,
    name: str,
    held_out: Sequence[Mapping[str, torch.Tensor]] = (),
) -> Result:
    """Substitute what `plan` says; nothing is fitted."""
    from passes.substitute import substitute
    from rewriter.report import RewriteReport

    rewritten = substitute(traced, found.sites, plan)
    report = RewriteReport.start(name, traced, found, plan)
    return Result(name, traced, found, plan, rewritten, report, held_out=held_out)


def make_plan(
    found: Found,
    *,
    form: str | Form | None = None,
    plan: Plan | Path | str | None = None,
    rules: Mapping[str, str | Form] | None = None,
) -> Plan:
    """The plan from exactly one of `form`, `plan` and `rules`."""
    given = [n for n, v in (("form", form), ("plan", plan), ("rules", rules)) if v]
    if len(given) != 1:
        told = " and ".join(given) if given else "none of them"
        raise UsageError(f"give exactly one of form, plan and rules; got {told}")
    if plan is not None:
        loaded = plan if isinstance(plan, Plan) else Plan.load(Path(plan))
        return bind_plan(loaded, found.sites)
    if form is not None and not found.sites:
        return Plan({})
    return plan_by_rules(found.sites, {"*": form} if form is not None else dict(rules or {}))


def why_nothing(found: Found, plan: Plan) -> str:
    """One message that says for every site (or near miss) why it stays as it is."""
    lines = [f"  {site}: {c.status} {c.why}" for site, c in plan.choices.items()]
    lines += [f"  near miss {m.node} ({m.source}): {m.reason}" for m in found.near_misses]
    head = f"rewritten 0 of {len(found.sites)} attention sites"
    advice = "change the form or plan, or allow that (on_noop='ok'; --allow-none)"
    if not found.sites:
        head = "no attention was found in this model, so there is nothing to rewrite"
        advice = "to take the model as it is, allow that (on_noop='ok'; --allow-none)"
    return "\n".join([f"{head}; {advice}", *lines])


def fit_result(
    result: Result,
    seconds: float,
    data: Sequence[Mapping[str, torch.Tensor]] | None,
    *,
    max_drop: float | None = None,
    state_dir: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Fit a `Result` in place, on `data`, measured on its `held_out`; completes its report."""
    from rewriter.fit import fit

    if data is None:
        raise UsageError("fitting needs `data`: batches of model inputs (dicts of tensors)")
    result.fitted = fit(
        result.rewritten,
        data,
        seconds=seconds,
        held_out=result.held_out or None,
        state_dir=state_dir,
        max_drop=max_drop,
        progress=progress,
    )
    result.plan = result.rewritten.plan
    result.report = result.report.with_fit(result.fitted, result.plan)


def fine_tune(
    result: Result,
    data: Sequence[Mapping[str, torch.Tensor]],
    loss: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor],
    *,
    seconds: float,
    **options: Any,
) -> FineTuned:
    """Train the rewritten model on a loss of your own; completes `result.report`.

    With two-expert layers (`moe`) 0.01 of the loss that balances their experts is added.

    Args:
        result: of `rewrite`, traced with a batch axis that fits `data` (``dynamic_shapes="auto"``).
        data: dicts of tensors: the model's inputs by name, and whatever else `loss` reads.
        loss: ``loss(outputs, batch) -> scalar tensor``.
        seconds: wall-clock budget.
        options: `validation`, `rates`, `state_dir`, `seed`, `refresh`, `progress` of
            `rewriter.supervised.fine_tune`, which holds the loop.

    Raises:
        UsageError, FitError.
    """
    from rewriter.linear_train import balanced
    from rewriter.moe_routing import ROUTED, tell_routing
    from rewriter.pipeline import measure_fidelity
    from rewriter.supervised import fine_tune as train

    with balanced(result, loss) as whole:
        done = train(result.rewritten, data, whole, seconds=seconds, **options)
    tell_routing(result, options.get("validation") or data[:ROUTED])
    result.tuned = done
    report = result.report.with_fidelity(measure_fidelity(result))
    result.report = report.with_notes(
        f"Fine-tuned on labelled data: validation loss {done.loss_before:.4g} -> "
        f"{done.loss_after:.4g} in {done.steps} steps; likeness to the original was not aimed at."
    )
    return done


def compile(
    model: Any,
    example_inputs: Inputs | None = None,
    *,
    path: Path | str,
    target: str | Target = "cpu",
    session: Path | None = None,
    allow_unscheduled: bool = False,
    threads: int | None = None,
    precision: str = "fp32",
    progress: Progress | None = None,
    **rewrite_options: Any,
) -> Artifact:
    """Compile a model (or a `Result` of `rewrite`) into one artifact file, verified.

    Args:
        model: a `Result`, or anything `rewrite` takes (then `rewrite_options` are its options;
            without form, plan or rules every site gets the `exact` form).
        example_inputs: needed unless `model` is a Result; fixes the compiled shapes.
        path: the file to write; nothing is left there if anything fails.
        target: a target or its name (``rewriter targets``).
        session: a tuning session's folder whose records are applied.
        allow_unscheduled: let kernels without a schedule rule through (slow; never the default).
        threads: threads the code is cut for, is checked with and uses where `load` names no
            other number (default: the cores this process may use).
        precision: of products with weights: "fp32", "bf16" or "int8" (docs/targets.md says what
            each needs, and where softmax attention is in bfloat16); the report says what it costs.

    Returns:
        The loaded artifact; for a target that can not run here, an artifact that only describes.

    Raises:
        LoweringError, ArtifactError, VerifyError and what `rewrite` raises.
    """
    from rewriter.outputs import check_file
    from rewriter.pipeline import build_artifact

    path = Path(path)
    check_file(path)
    result = (
        model
        if isinstance(model, Result)
        else _rewrite_for_compile(
            model, example_inputs, progress, {"target": target, **rewrite_options}
        )
    )
    return build_artifact(
        result,
        path,
        target=target,
        session=session,
        allow_unscheduled=allow_unscheduled,
        threads=threads,
        progress=progress,
        precision=precision,
    )


def _rewrite_for_compile(
    model: Any, example_inputs: Inputs | None, progress: Progress | None, options: dict[str, Any]
) -> Result:
    if example_inputs is None:
        raise UsageError("compile needs example_inputs (they fix the compiled shapes)")
    if not any(options.get(k) for k in ("form", "plan", "rules", "linear")):
        options = {**options, "form": "exact"}
    return rewrite(model, example_inputs, progress=progress, **options)


def load(path: Path | str, *, threads: int | None = None) -> Artifact:
    """Load an artifact; needs numpy and TVM's runtime, neither torch nor the compiler.

    Raises:
        ArtifactError: the file is missing, damaged, altered or made for another machine.
    """
    from codegen.runtime import load as load_artifact

    return load_artifact(Path(path), threads=threads)


def tune(
    model: Any,
    example_inputs: Inputs | None = None,
    *,
    session: Path | str,
    target: str | Target = "cpu",
    minutes: float = 10.0,
    progress: Progress | None = None,
    **rewrite_options: Any,
) -> TuningSession:
    """Search better schedules for the kernels of a model, in a folder that survives a kill.

    Called again with the same folder it goes on where it was. `compile(session=folder)` applies
    what was found.
    """
    from rewriter.session import TuningSession

    result = (
        model
        if isinstance(model, Result)
        else _rewrite_for_compile(model, example_inputs, progress, rewrite_options)
    )
    opened = TuningSession.open(Path(session), result, target=target)
    opened.run(minutes=minutes, progress=progress)
    return opened
