"""What `compile --decode` and `run --generate` do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import UsageError

if TYPE_CHECKING:
    from codegen.runtime import Artifact
    from rewriter.api import Result
    from rewriter.loaded import LoadedModel


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
