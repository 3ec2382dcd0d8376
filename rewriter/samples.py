"""Batches to fit on and to measure on: from a file of the user's, or text that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.errors import FitError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from rewriter.loaded import LoadedModel

Batches = list[dict[str, "Tensor"]]
FIT_TEXTS, HELD_OUT_TEXTS = 24576, 96
FEW_TEXTS = 24  # for a first look at fidelity without a fit
HELD_OUT_SHARE = 8  # one sample in so many is measured on, never fitted on


def samples_for(
    loaded: LoadedModel, data: Path | None, *, dynamic: bool
) -> tuple[Batches, Batches]:
    """(batches to fit on, batches held out) for a model.

    Args:
        loaded: the model; its example inputs give names and, if not `dynamic`, sizes.
        data: a .txt file (one text a line, needs the model's tokenizer), an .npz of arrays
            [N, ...] by input name, or None: sentences from installed packages for text models.
        dynamic: batches may have any size and length.

    Raises:
        UsageError: there is no data for this model, or the file is of another kind.
        FitError: the data is empty or does not fit the model.
    """
    batch, tokens = _sizes(loaded, dynamic)
    if data is not None and data.suffix == ".npz":
        return _split(_from_npz(data, loaded, batch))
    if loaded.tokenizer_path is None:
        raise UsageError(
            f"{loaded.name} has no tokenizer here, so there is no data to fit or measure on; "
            "give --data FILE.npz with arrays of the model's inputs"
        )
    fit_on, held_out = _texts(data)
    return (
        _tokenised(loaded, fit_on, batch, tokens, dynamic),
        _tokenised(loaded, held_out, batch, tokens, dynamic),
    )


def labelled(loaded: LoadedModel, data: Path, *, dynamic: bool) -> tuple[Batches, Batches]:
    """(batches to train on, batches to validate on) from an .npz of inputs and labels."""
    batch, _ = _sizes(loaded, dynamic)
    return _split(_from_npz(data, loaded, 32 if dynamic else batch, labels=True))


def few_held_out(loaded: LoadedModel) -> Batches:
    """Some real sentences at the example input's own sizes; [] for a model without a tokenizer."""
    if loaded.tokenizer_path is None:
        return []
    from rewriter.calibration import passages, split_sentences

    batch, tokens = _sizes(loaded, dynamic=False)
    texts = passages(
        split_sentences(libraries=False)[1], max(batch, FEW_TEXTS // batch * batch), seed=1
    )
    return _tokenised(loaded, texts, batch, tokens, dynamic=False)


def _sizes(loaded: LoadedModel, dynamic: bool) -> tuple[int, int]:
    first = next(iter(loaded.example_inputs.values()))
    tokens = int(first.shape[1]) if first.ndim > 1 else 1
    return (8, min(tokens, 128)) if dynamic else (int(first.shape[0]), tokens)


def _texts(data: Path | None) -> tuple[list[str], list[str]]:
    from rewriter.calibration import passages, split_sentences

    if data is None:
        fit_on, held_out = split_sentences()
        return passages(fit_on, FIT_TEXTS), passages(held_out, HELD_OUT_TEXTS, seed=1)
    if data.suffix != ".txt":
        raise UsageError(f"--data {data}: expected a .txt or .npz file")
    try:
        lines = [line.strip() for line in data.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--data {data}: can not be read ({error})") from error
    texts = [line for line in lines if line]
    if len(texts) < 2 * HELD_OUT_SHARE:
        raise FitError(f"--data {data}: {len(texts)} texts are too few; give at least 16 lines")
    held_out = texts[::HELD_OUT_SHARE]
    return [t for i, t in enumerate(texts) if i % HELD_OUT_SHARE], held_out


def _tokenised(
    loaded: LoadedModel, texts: Sequence[str], batch: int, tokens: int, dynamic: bool
) -> Batches:
    from transformers import AutoTokenizer

    from rewriter.calibration import text_batches

    tokenizer: Any = AutoTokenizer.from_pretrained(loaded.tokenizer_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    names = list(loaded.example_inputs)
    made = text_batches(tokenizer, texts, names=names, batch=batch, tokens=tokens, full=not dynamic)
    return [dict(b) for b in made]


def _from_npz(path: Path, loaded: LoadedModel, batch: int, *, labels: bool = False) -> Batches:
    import torch

    from rewriter.arrays import read_arrays

    arrays = read_arrays(path, "--data")
    missing = [n for n in loaded.example_inputs if n not in arrays]
    if missing:
        raise UsageError(f"--data {path}: lacks {', '.join(missing)}, which the model takes")
    counts = {len(arrays[n]) if arrays[n].ndim else 0 for n in loaded.example_inputs}
    if len(counts) != 1 or min(counts) < batch * 2:
        raise FitError(
            f"--data {path}: needs at least {batch * 2} samples of every input, all of one number"
        )
    tensors = {n: _as(torch.from_numpy(arrays[n]), e) for n, e in loaded.example_inputs.items()}
    for name in sorted(set(arrays) - set(tensors)) if labels else ():
        if arrays[name].ndim == 0 or len(arrays[name]) != min(counts):
            raise FitError(
                f"--data {path}: {name} must have {min(counts)} rows, as the inputs have"
            )
        tensors[name] = torch.from_numpy(arrays[name])
    return [
        {n: t[i : i + batch] for n, t in tensors.items()}
        for i in range(0, min(counts) - batch + 1, batch)
    ]


def _as(value: Tensor, example: Tensor) -> Tensor:
    """In the model's type where only the width differs: numpy's own default is float64."""
    alike = value.is_floating_point() == example.is_floating_point()
    plain = "bool" not in f"{value.dtype}{example.dtype}"
    return value.to(example.dtype) if alike and plain else value


def _split(batches: Batches) -> tuple[Batches, Batches]:
    held_out = batches[::HELD_OUT_SHARE]
    rest = [b for i, b in enumerate(batches) if i % HELD_OUT_SHARE]
    return rest or held_out, held_out
