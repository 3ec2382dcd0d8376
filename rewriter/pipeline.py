"""From a rewritten model to an artifact: seal, import, lower, build, write, verify."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codegen.target import Target, checked_threads, target_named
from passes.errors import ArtifactError

if TYPE_CHECKING:
    from codegen.kernel_cache import KernelCache
    from codegen.lower import Lowered
    from codegen.manifest import Manifest
    from codegen.runtime import Artifact
    from rewriter.api import Result
    from rewriter.verify import ErrorStats

Progress = Callable[..., None]
STAGES = ("seal", "import", "lower", "build", "write", "verify")


@dataclass
class Stages:
    """Tells `progress(stage, done, total)` which stage runs and keeps how long each took."""

    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[None]:
        """Time one stage."""
        if self.progress is not None:
            self.progress(f"{name} {detail}".rstrip(), len(self.seconds), len(STAGES))
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        if self.progress is not None:
            self.progress(name, len(self.seconds), len(STAGES))

    def kernel(self, _name: str, done: int, total: int) -> None:
        """Tell how many kernels of the stage that runs are done."""
        if self.progress is not None:
            self.progress("lower", len(self.seconds) + done / max(total, 1), len(STAGES))


def lower_result(
    result: Result,
    target: Target,
    stages: Stages,
    *,
    tuned: Any = None,
    allow_unscheduled: bool = False,
    cache: KernelCache | None = None,
    precision: str = "fp32",
) -> Lowered:
    """seal -> frontend -> lower: scheduled TensorIR with the weights lifted out."""
    from codegen.frontend import to_relax
    from codegen.lower import lower
    from passes.seal import seal

    with stages.stage("seal"):
        sealed = seal(result.rewritten)
    with stages.stage("import"):
        imported = to_relax(sealed, target)
    with stages.stage("lower"):
        return lower(
            imported,
            target,
            tuned=tuned,
            allow_unscheduled=allow_unscheduled,
            progress=stages.kernel,
            cache=cache,
            precision=precision,
        )


def build_artifact(
    result: Result,
    path: Path,
    *,
    target: str | Target,
    session: Path | None = None,
    allow_unscheduled: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    precision: str = "fp32",
) -> Artifact:
    """Everything from the rewritten model to a verified artifact at `path`.

    The file appears at `path` only when all of it worked. `result.report` is completed.

    Raises:
        LoweringError, ArtifactError, VerifyError, TuningError; UsageError for a precision the
        target has no code for.
    """
    from codegen.build import build
    from codegen.container import write_artifact
    from codegen.kernel_cache import default_cache
    from codegen.manifest import make_manifest
    from codegen.precision import PRECISIONS, require

    chosen = target_named(target) if isinstance(target, str) else target
    require(precision, chosen)
    stages = Stages(progress)
    tuned = _tuned(session, chosen)
    if threads is not None:
        chosen = replace(chosen, threads=checked_threads(threads))
    cache = default_cache()
    lowered = lower_result(
        result,
        chosen,
        stages,
        tuned=tuned,
        allow_unscheduled=allow_unscheduled,
        cache=cache,
        precision=precision,
    )
    with stages.stage("build", f"{len(lowered.kernels)} kernels"):
        built = build(lowered, chosen, cache=cache)
    manifest = make_manifest(
        result.name,
        chosen,
        lowered.inputs,
        lowered.outputs,
        list(lowered.weights),
        plan=result.plan.to_json(),
        precision=PRECISIONS[precision],
        peak_memory=None if lowered.memory is None else lowered.memory.peak,
    )
    trial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.trial")
    try:
        with stages.stage("write"):
            write_artifact(trial, manifest, built.code, lowered.weights, {}, called=str(path))
        with stages.stage("verify"):
            stats, note = _verify(result, trial, manifest, threads)
    finally:
        trial.unlink(missing_ok=True)
    if stats is not None:
        stats.require()
    _complete(result, lowered, chosen, stats, note, stages, tuned, precision)
    write_artifact(path, manifest, built.code, lowered.weights, result.report.to_json())
    return _open(path, threads, runs_here=stats is not None)


def _tuned(session: Path | None, target: Target) -> Any:
    if session is None:
        return None
    from rewriter.session import records_for

    return records_for(session, target)


def _verify(
    result: Result, trial: Path, manifest: Manifest, threads: int | None
) -> tuple[ErrorStats | None, str]:
    """Compiled against rewritten; (None, why) where the code can not run on this machine."""
    from codegen.runtime import load
    from rewriter.verify import verify_artifact

    why = why_not_here(manifest)
    if why:
        return None, f"the compiled code was not run here: {why}"
    with load(trial, threads=threads) as artifact:
        return verify_artifact(artifact, result.model, example_inputs(result)), ""


def why_not_here(manifest: Manifest) -> str:
    """Why an artifact can not run on this machine; "" when it can."""
    from codegen.host import this_host
    from codegen.runtime import check_host

    try:
        check_host(manifest, "artifact", this_host())
    except ArtifactError as error:
        return str(error)
    return ""


def example_inputs(result: Result) -> Any:
    """The traced example inputs: a dict if the model takes keywords, else a tuple."""
    traced = result.traced
    return dict(traced.example_kwargs) if traced.example_kwargs else tuple(traced.example_args)


def _complete(
    result: Result,
    lowered: Lowered,
    target: Target,
    stats: ErrorStats | None,
    note: str,
    stages: Stages,
    tuned: Any,
    precision: str,
) -> None:
    cost = {
        **precision_cost(precision, stats),
        "attention_in_bf16": any(k.scheduled_by == "attention_bf16" for k in lowered.kernels),
    }
    notes = [*lowered.notes, *([note] if note else []), *_cost_note(cost)]
    weights = sum(array.nbytes for array in lowered.weights.values())
    facts = {
        "weights_bytes": weights,
        "seconds": dict(stages.seconds),
        "code_from_cache": lowered.code is not None,
        "precision": cost,
        "memory": None if lowered.memory is None else lowered.memory.to_json(),
    }
    if tuned is not None:
        tuned.name_all(lowered.unscheduled)
        notes.append(tuned.summary())
        facts["tuning"] = tuned.to_json()
        tuned.close()
    report = result.report
    if report.fidelity is None:
        report = report.with_fidelity(measure_fidelity(result))
    result.report = report.with_compiled(
        stats, lowered.kernels, target.to_json(), artifact=facts, notes=notes
    )


def precision_cost(precision: str, stats: ErrorStats | None) -> dict[str, Any]:
    """What computing in `precision` changed, on the example inputs: plain data for the report.

    Against the rewritten model in float32: lowest cosine over rows, relative error (rms), largest
    difference. For "fp32" that is the rounding of another order of operations.
    """
    if stats is None:
        return {"name": precision}
    return {
        "name": precision,
        "cosine_min": stats.cosine_min,
        "relative_error": stats.rms_ratio,
        "max_abs": stats.max_abs,
    }


def _cost_note(cost: Mapping[str, Any]) -> list[str]:
    if cost["name"] == "fp32" or "cosine_min" not in cost:
        return []
    attention = ", those of softmax attention in bf16" if cost["attention_in_bf16"] else ""
    return [
        f"products with weights are computed in {cost['name']}{attention}: against the rewritten "
        f"model in float32 the lowest cosine is {cost['cosine_min']:.5f} and the relative error "
        f"{cost['relative_error']:.2%} on the example inputs (the error of the compiled code "
        "is this and rounding)"
    ]


def measure_fidelity(result: Result) -> Any:
    """Rewritten against original, on `result.held_out` or else on the example inputs."""
    from rewriter.calibration import input_names
    from rewriter.fidelity import fidelity

    batches = result.held_out
    if not batches:
        traced = result.traced
        values = [*traced.example_args, *traced.example_kwargs.values()]
        batches = [dict(zip(input_names(traced), values, strict=True))]
    return fidelity(result.traced.module, result.model, batches)


def _open(path: Path, threads: int | None, *, runs_here: bool) -> Artifact:
    from codegen.runtime import load

    if not runs_here:
        from codegen.foreign import ForeignArtifact

        return ForeignArtifact(path)  # type: ignore[return-value]
    return load(path, threads=threads)
