"""Fine-tuning from the command line: the loss by name, the data from a file, the bar."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import UsageError
from rewriter.cli.work import progress_bar

if TYPE_CHECKING:
    from rewriter.api import Result
    from rewriter.loaded import LoadedModel


def named_loss(spec: str | None, data: Path | None, seconds: float) -> Callable[..., Any] | None:
    """The function behind ``module:function``; `UsageError` before the model is opened."""
    if spec is None:
        return None
    if data is None or data.suffix != ".npz":
        raise UsageError("--loss: needs --data FILE.npz with the model's inputs and the labels")
    if not math.isfinite(seconds) or seconds <= 0:
        raise UsageError(f"--loss-seconds: must be a positive number, got {seconds}")
    module_name, _, name = spec.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module_name), name, None) if name else None
    except ImportError as error:
        raise UsageError(f"--loss {spec}: can not be imported ({error})") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise UsageError(f"--loss {spec}: expected MODULE:FUNCTION, a loss(outputs, batch)")
    return found  # type: ignore[no-any-return]


def tune_labelled(
    loaded: LoadedModel,
    result: Result,
    data: Path | None,
    loss: Callable[..., Any],
    seconds: float,
    state: Path,
) -> None:
    """Fine-tune a fitted `Result` in place, with a bar; Ctrl-C keeps the state."""
    from rewriter.api import fine_tune
    from rewriter.samples import labelled

    assert data is not None
    train, held_out = labelled(loaded, data, dynamic=bool(result.traced.dynamic))
    folder = state.with_name(f"{state.name}-labelled")
    with progress_bar("fine-tune") as progress:
        try:
            fine_tune(
                result,
                train,
                loss,
                seconds=seconds,
                validation=held_out,
                state_dir=folder,
                progress=progress,
            )
        except KeyboardInterrupt as stop:
            kept = f"The training is kept in {folder}; the same command goes on from there."
            raise KeyboardInterrupt(kept) from stop
