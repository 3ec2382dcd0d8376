"""Compile a decoder-only model to generate: an artifact with the functions prefill and step.

The rewritten model is sealed twice (passes/decode_seal.py), for one token and for a chunk of the
prompt; both are lowered, joined over the same weights, built into one library and verified: logits
token by token against the rewritten model on the whole example input.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codegen.target import Target, target_named
from passes.errors import UsageError
from rewriter.pipeline import Stages, example_inputs, measure_fidelity, why_not_here

if TYPE_CHECKING:
    from codegen.lower import Lowered
    from codegen.manifest import Manifest
    from codegen.runtime import Artifact
    from passes.decode_seal import SealedStep
    from rewriter.api import Result
    from rewriter.verify import ErrorStats

Progress = Callable[..., None]
CHUNK = 32  # tokens of a prompt taken in at once
CHECKED = 64  # tokens that are verified one by one


@dataclass(frozen=True)
class _Compiled:
    lowered: Lowered
    code: bytes
    manifest: Manifest


def compile_decoder(
    model: Any,
    result: Result,
    *,
    path: Path | str,
    max_length: int | None = None,
    chunk: int = CHUNK,
    target: str | Target = "cpu",
    allow_unscheduled: bool = False,
    threads: int | None = None,
    precision: str = "fp32",
    progress: Progress | None = None,
) -> Artifact:
    """Compile a rewritten language model into an artifact that generates, verified.

    Args:
        model: the module `result` was made from (``language_model(loaded).model`` for a Hugging
            Face model); its forward also takes position_ids [B, T].
        result: of `rewrite`: every site a form that streams (exact, elu, hedgehog, ...).
        path: the file to write; nothing is left there if anything fails.
        max_length: longest sequence, prompt and new tokens together; None: what the model's
            config says, or the window of its masks where the example is too short to show it.
            States of constant size need none without a table of positions.
        chunk: tokens of the prompt that ``prefill`` takes at once.
        precision: of products with weights, as `rewriter.api.compile` has it.

    Returns:
        The loaded artifact (`artifact.generate`), or one that only describes where the target can
        not run here.

    Raises:
        FormError: a form that can not go token by token.
        ModelError: a model without logits or position_ids.
        UsageError, LoweringError, ArtifactError, VerifyError.
    """
    from codegen.container import write_artifact
    from codegen.precision import require
    from rewriter.outputs import check_file

    path = Path(path)
    check_file(path)
    chosen = target_named(target) if isinstance(target, str) else target
    require(precision, chosen)
    for name, value in (("max_length", max_length), ("chunk", chunk)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: must be at least 1, got {value}")
    max_length = _within_window(model, result, max_length)
    stages = Stages(progress)
    sealed = _seal(model, result, max_length, chunk, stages)
    options = {"allow_unscheduled": allow_unscheduled, "precision": precision}
    made = _compile(result, sealed, chosen, options, max_length, stages)
    trial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.trial")
    weights = made.lowered.weights
    try:
        with stages.stage("write"):
            write_artifact(trial, made.manifest, made.code, weights, {}, called=str(path))
        with stages.stage("verify"):
            stats, note = _verify(result, trial, made.manifest, threads)
    finally:
        trial.unlink(missing_ok=True)
    if stats is not None:
        stats.require()
    _complete(result, made, chosen, stats, note, stages)
    write_artifact(path, made.manifest, made.code, weights, result.report.to_json())
    return _open(path, threads, runs_here=stats is not None)


def _seal(
    model: Any, result: Result, max_length: int | None, chunk: int, stages: Stages
) -> dict[str, SealedStep]:
    from codegen.decoding import PREFILL, STEP
    from passes.decode_seal import seal_step
    from rewriter.decode_models import default_length, told_positions

    length = max_length or default_length(model)
    sizes = {STEP: 1, **({PREFILL: min(chunk, length)} if min(chunk, length) > 1 else {})}
    with stages.stage("seal"), told_positions(model) as told:
        return {
            name: seal_step(told, result.rewritten, tokens=tokens, length=length)
            for name, tokens in sizes.items()
        }


def _within_window(model: Any, result: Result, max_length: int | None) -> int | None:
    """`max_length`, or less where the example does not show all that the masks hide."""
    from rewriter.decode_models import default_length, unseen_window

    tokens = max((int(site.dims.S) for site in result.rewritten.sites), default=1)
    window = unseen_window(model, tokens)
    if window is None:
        return max_length
    if max_length is not None and max_length > window:
        raise UsageError(
            f"max_length: the model sees {window} keys at most, which an example of {tokens} "
            f"tokens does not show; give a longer example (--tokens {window + 1}) or at most "
            f"{window} here, got {max_length}"
        )
    return min(max_length or window, default_length(model))


def _compile(
    result: Result,
    sealed: dict[str, SealedStep],
    target: Target,
    options: Mapping[str, Any],
    max_length: int | None,
    stages: Stages,
) -> _Compiled:
    from codegen.build import build
    from codegen.decode_merge import merge
    from codegen.decoding import PREFILL, STEP, Decode
    from codegen.frontend import to_relax
    from codegen.kernel_cache import default_cache, key_of
    from codegen.lower import lower
    from codegen.manifest import make_manifest
    from codegen.precision import PRECISIONS

    with stages.stage("import"):
        imported = {name: to_relax(s.program, target) for name, s in sealed.items()}
    tokens, positions, *states = imported[STEP].inputs
    length = _length(result, positions.high, max_length, sealed[STEP])
    with stages.stage("lower"):
        lowered = merge(
            {
                name: lower(i, target, progress=stages.kernel, **options)
                for name, i in imported.items()
            }
        )
    cache = default_cache()
    if cache is not None:
        key = key_of(lowered.mod, target, decode=True)
        known = cache.get(key)
        lowered = replace(lowered, key=key, code=None if known is None else known.code)
    with stages.stage("build", f"{len(lowered.kernels)} kernels"):
        built = build(lowered, target, cache=cache)
    chunk = sealed[PREFILL].tokens if PREFILL in sealed else 1
    facts = Decode(tokens.shape[0], chunk, length, sum(s.nbytes for s in states))
    names = ["logits", *(f"new_{s.name}" for s in states)]
    outputs = [replace(o, name=n) for o, n in zip(lowered.outputs, names, strict=True)]
    manifest = make_manifest(
        result.name,
        target,
        lowered.inputs,
        outputs,
        list(lowered.weights),
        plan=result.plan.to_json(),
        precision=PRECISIONS[options["precision"]],
        entry=STEP,
    )
    return _Compiled(lowered, built.code, replace(manifest, decode=facts.to_json()))


def _length(result: Result, high: int | None, asked: int | None, step: SealedStep) -> int | None:
    """Tokens a sequence may have: the states', the position table's, or what was asked for."""
    from passes.decode_form import Streaming

    table = None if high is None else high + 1
    if table is not None and asked is not None and asked > table:
        raise UsageError(
            f"max_length: the model has positions for {table} tokens at most, got {asked}"
        )
    sites = [result.rewritten.attention(site.id) for site in result.rewritten.sites]
    bounded = any(isinstance(s.form, Streaming) and s.form.bounded(s.site) for s in sites)
    limits = [n for n in (table, asked, step.length if bounded else None) if n is not None]
    return min(limits, default=None)


def _verify(
    result: Result, trial: Path, manifest: Manifest, threads: int | None
) -> tuple[ErrorStats | None, str]:
    """Compiled against rewritten; (None, why) where the code can not run on this machine."""
    from codegen.runtime import load

    why = why_not_here(manifest)
    if why:
        return None, f"the compiled code was not run here: {why}"
    with load(trial, threads=threads) as artifact:
        return verify_decoder(artifact, result.model, example_inputs(result)), ""


def verify_decoder(artifact: Artifact, module: Any, inputs: Any) -> ErrorStats:
    """Logits of the artifact, token by token, against those of `module` on all of `inputs`.

    The example input is given as a prompt but for its last `CHECKED` tokens (or half of it),
    which are fed one by one.
    """
    from codegen.decoding import Decoder
    from rewriter.verify import compare_outputs

    ids, logits = _wanted(module, inputs)
    decoder = Decoder(artifact)
    number = min(ids.shape[1], decoder.facts.length or ids.shape[1])
    first = max(number - CHECKED, number // 2, 1)
    got = [decoder.feed(ids[:, :first])]
    got += [decoder.feed(ids[:, at : at + 1]) for at in range(first, number)]
    return compare_outputs(
        {"logits": np.stack(got, 1)},
        {"logits": logits[:, first - 1 : number]},
        module,
        artifact.manifest.precision,
    )


def _wanted(module: Any, inputs: Any) -> tuple[Any, Any]:
    """(input_ids, logits) of `module` on a dict or tuple of inputs, as arrays."""
    import torch

    from rewriter.verify import flat_tensors, to_numpy

    with torch.no_grad():
        out = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    logits = out["logits"] if isinstance(out, dict) and "logits" in out else flat_tensors(out)[0]
    ids = inputs["input_ids"] if isinstance(inputs, dict) else inputs[0]
    return to_numpy(ids), to_numpy(logits)


def _complete(
    result: Result,
    made: _Compiled,
    target: Target,
    stats: ErrorStats | None,
    note: str,
    stages: Stages,
) -> None:
    from codegen.decoding import described

    facts = {
        "weights_bytes": sum(array.nbytes for array in made.lowered.weights.values()),
        "seconds": dict(stages.seconds),
        "decode": dict(made.manifest.decode),
    }
    notes = [described(made.manifest.decode), *made.lowered.notes, *([note] if note else [])]
    report = result.report
    if report.fidelity is None:
        report = report.with_fidelity(measure_fidelity(result))
    result.report = report.with_compiled(
        stats, made.lowered.kernels, target.to_json(), artifact=facts, notes=notes
    )


def _open(path: Path, threads: int | None, *, runs_here: bool) -> Artifact:
    from codegen.runtime import load

    if not runs_here:
        from codegen.foreign import ForeignArtifact

        return ForeignArtifact(path)  # type: ignore[return-value]
    return load(path, threads=threads)
