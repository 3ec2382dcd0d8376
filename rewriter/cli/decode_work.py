"""What `compile --decode` and `run --generate` do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import UsageError

if TYPE_CHECKING:
    from codegen.runtime import Artifact
    from rewriter.api import Result
    from rewriter.loaded import LoadedModel

Compare = Callable[..., Any]
EXAMPLE = 128  # tokens an artifact that generates is verified on


def check_decode(decode: bool, max_length: int | None, session: Path | None) -> None:
    """`UsageError` for options that do not go together."""
    if max_length is not None and not decode:
        raise UsageError("--max-length needs --decode: it limits what is generated")
    if decode and session is not None:
        raise UsageError("--session does not go with --decode: its records are of other shapes")


def for_decode(loaded: LoadedModel, decode: bool) -> LoadedModel:
    """The model with logits and without a mask where it is to generate, else as it is."""
    if not decode:
        return loaded
    from rewriter.decode_models import language_model

    return language_model(loaded)


def compile_result(
    loaded: LoadedModel, result: Result, decode: bool, max_length: int | None, **options: Any
) -> Artifact:
    """One artifact, of the usual kind or one that generates."""
    from rewriter.api import compile as compile_artifact
    from rewriter.decode import compile_decoder

    if not decode:
        return compile_artifact(result, **options)
    del options["session"]
    return compile_decoder(loaded.model, result, max_length=max_length, **options)


def model_for(opened: Artifact, model: str, attn: str) -> tuple[LoadedModel, Compare]:
    """MODEL with inputs of the artifact's shape, and what compares the two."""
    from rewriter.cli.options import open_model
    from rewriter.verify import verify_artifact

    shape = opened.inputs[0].shape
    if opened.manifest.decode:
        from rewriter.decode import verify_decoder

        tokens = min(EXAMPLE, opened.manifest.decode.get("length") or EXAMPLE)
        return for_decode(open_model(model, tokens, shape[0], None, attn), True), verify_decoder
    tokens = shape[1] if len(shape) == 2 else None
    image = shape[-1] if len(shape) == 4 else None
    return open_model(model, tokens, shape[0] if shape else 1, image, attn), verify_artifact


def refuse_decode(subject: str) -> None:
    """`UsageError` for an artifact that generates: a single call of it says little."""
    from codegen.archive import describe

    if Path(subject).is_file() and describe(subject).decode:
        raise UsageError(
            f"{subject}: this artifact generates tokens; rewriter run --generate says how many a "
            "second"
        )


def generate(artifact: Artifact, inputs: Mapping[str, Any], number: int) -> dict[str, Any]:
    """{"tokens": the new ones [B, number], "seconds", "tokens_per_second"} after a prompt.

    `inputs` holds the prompt [B, n] under the name of the artifact's first input.
    """
    from codegen.decoding import Decoder

    decoder, name = Decoder(artifact), artifact.inputs[0].name
    if list(inputs) != [name]:
        given = ", ".join(inputs) or "nothing"
        raise UsageError(f"--input: {given} given, the prompt {name} [batch, tokens] expected")
    start = time.perf_counter()
    tokens = decoder.generate(inputs[name], number)
    seconds = time.perf_counter() - start
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens.shape[1] / seconds}
