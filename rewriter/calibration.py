"""Calibration data: real English from the machine itself, as model inputs, and checks of any data.

No labels and no download: paragraphs of the docstrings of the standard library and of installed
libraries, and of the licence texts in /usr/share/common-licenses.
"""

from __future__ import annotations

import ast
import inspect
import random
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.errors import FitError
from passes.traced import Traced
from rewriter.library_text import library_paragraphs

Batch = dict[str, Tensor]
LICENSES = Path("/usr/share/common-licenses")
LICENCES = "licences"  # the document they make
MOST_ASIDE = 64  # samples, or 8 batches where those are more
FEWEST = 4  # batches from which some are set aside to choose the best state
SHORTEST = 6  # words; less is a heading or a stray word, not a sentence


def installed_documents() -> dict[str, list[str]]:
    """Paragraphs of at least six words by document, in a fixed order, each paragraph once.

    A document is a top-level module or package of the standard library; all licence texts, which
    quote each other, are one ("licences").

    Raises:
        FitError: this Python has neither sources nor licence texts (give calibration data then).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py")) + sorted(root.glob("*/*.py"))
    texts: dict[str, list[str]] = {}
    for path in files:
        inside = path.relative_to(root)
        if _is_prose(inside):
            texts.setdefault(inside.parts[0], []).extend(_docstrings(path))
    if LICENSES.is_dir():
        real = sorted(p for p in LICENSES.iterdir() if p.is_file() and not p.is_symlink())
        texts[LICENCES] = [p.read_text(errors="ignore") for p in real]
    seen: set[str] = set()
    found = {name: _new(texts[name], seen) for name in texts}
    if not seen:
        raise FitError("no text was found on this machine to calibrate with; give data instead")
    return {name: paragraphs for name, paragraphs in found.items() if paragraphs}


def _new(texts: Sequence[str], seen: set[str]) -> list[str]:
    """Paragraphs of `texts` that are not in `seen`, which they are then."""
    fresh = [p for p in dict.fromkeys(p for t in texts for p in _paragraphs(t)) if p not in seen]
    seen.update(fresh)
    return fresh


def _is_prose(path: Path) -> bool:
    return not any("test" in part or part == "site-packages" for part in path.parts)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _paragraphs(text: str) -> Iterator[str]:
    for part in re.split(r"\n\s*\n", text):
        words = part.split()
        if len(words) >= SHORTEST:
            yield " ".join(words)


def split_sentences(
    seed: int = 0, held_out: int = 1500, *, libraries: bool = True
) -> tuple[list[str], list[str]]:
    """(for fitting, held out): two shuffled lists of paragraphs, no document in both.

    Documents of the standard library are held out whole until they have `held_out` paragraphs, or a
    quarter of all. What installed libraries say (rewriter/library_text.py) is all for fitting, and
    left out without `libraries`, which takes a third of the time.
    """
    documents = installed_documents()
    draw = random.Random(seed)
    names = [n for n in documents if n != LICENCES]
    draw.shuffle(names)
    most = min(held_out, sum(map(len, documents.values())) // 4)
    held: list[str] = []
    for name in names:
        if len(held) + len(documents[name]) <= most:
            held += documents.pop(name)
    fit = [p for paragraphs in documents.values() for p in paragraphs]
    draw.shuffle(fit)
    draw.shuffle(held)
    if libraries:
        fit += library_paragraphs(_paragraphs, {*fit, *held})
        draw.shuffle(fit)
    return fit, held


def passages(texts: Sequence[str], count: int, *, seed: int = 0) -> list[str]:
    """`count` passages of mixed length: one half single paragraphs, one half of 30 to 110 words."""
    if not texts:
        raise FitError("no text to make calibration passages from")
    draw = random.Random(seed)
    made: list[str] = []
    for i in range(count):
        passage = draw.choice(texts)
        wanted = draw.randint(30, 110) if i % 2 else 0
        while len(passage.split()) < wanted:
            passage += " " + draw.choice(texts)
        made.append(passage)
    return made


def text_batches(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    names: Sequence[str] = ("input_ids", "attention_mask"),
    batch: int = 8,
    tokens: int = 128,
    full: bool = False,
) -> list[Batch]:
    """Texts as padded model inputs, texts of like length together.

    Args:
        tokenizer: a Hugging Face tokenizer (called with a list of texts).
        names: which of the tokenizer's outputs the model takes.
        batch: texts per batch.
        tokens: longer texts are cut here.
        full: pad every batch to `tokens` and drop a smaller last batch, as a model traced with
            fixed sizes needs.

    Returns:
        Batches of int64 tensors [batch, T], T <= tokens, each with the names asked for.

    Raises:
        FitError: no text, or the tokenizer does not make what the model takes.
    """
    lengths = [len(ids) for ids in _encode(tokenizer, texts, tokens)["input_ids"]]
    order = sorted(range(len(texts)), key=lambda i: lengths[i])
    groups = [order[i : i + batch] for i in range(0, len(order), batch)]
    if full:
        groups = [g for g in groups if len(g) == batch]
    if not groups:
        raise FitError(f"{len(texts)} texts do not fill one batch of {batch}")
    made = [_padded(tokenizer, [texts[i] for i in g], tokens, full) for g in groups]
    missing = [n for n in names if n not in made[0]]
    if missing:
        raise FitError(f"the tokenizer makes {', '.join(made[0])}, not {', '.join(missing)}")
    return [{n: b[n] for n in names} for b in made]


def _encode(tokenizer: Any, texts: Sequence[str], tokens: int) -> Mapping[str, Any]:
    if not texts:
        raise FitError("no text to make calibration batches from")
    encoded: Mapping[str, Any] = tokenizer(list(texts), truncation=True, max_length=tokens)
    return encoded


def _padded(tokenizer: Any, texts: Sequence[str], tokens: int, full: bool) -> dict[str, Tensor]:
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=tokens,
        padding="max_length" if full else "longest",
        return_tensors="pt",
    )
    return dict(encoded)


def input_names(traced: Traced) -> list[str]:
    """The names of the model's inputs in call order."""
    names = list(inspect.signature(traced.module.forward).parameters)
    given = len(traced.example_args)
    if len(names) < given or any(n not in names for n in traced.example_kwargs):
        # symbolic forwards (*args, **kwargs) do not say; the graph's placeholders do
        names = [str(n.target) for n in traced.module.graph.nodes if n.op == "placeholder"]
    return names[:given] + [n for n in traced.example_kwargs if n not in names[:given]]


def check_batches(
    batches: Sequence[Mapping[str, Any]], traced: Traced, what: str = "calibration data"
) -> list[Batch]:
    """The batches as a list, after every check that can be made before any work.

    Raises:
        FitError: empty, not dicts of tensors, wrong names, ranks, fixed sizes or dtypes, or values
            that are not finite; the message names the batch and the input.
    """
    if isinstance(batches, Mapping | Tensor) or not isinstance(batches, Sequence):
        raise FitError(f"{what} must be a list of batches (dicts of tensors)")
    if not batches:
        raise FitError(f"{what} is empty; give at least one batch")
    names = input_names(traced)
    examples = {**dict(zip(names, traced.example_args, strict=False)), **traced.example_kwargs}
    for index, batch in enumerate(batches):
        _check_names(batch, examples, f"{what}, batch {index}")
        for name, value in batch.items():
            _check_tensor(value, examples[name], traced.dynamic.get(name, {}), what, index, name)
    return [dict(b) for b in batches]


def _check_names(batch: Any, examples: Mapping[str, Any], where: str) -> None:
    if not isinstance(batch, Mapping):
        raise FitError(
            f"{where} is a {type(batch).__name__}; give a dict from input name to tensor"
        )
    needed = {n for n, v in examples.items() if isinstance(v, Tensor)}
    missing, unknown = needed - set(batch), set(batch) - needed
    if missing or unknown:
        told = [f"misses {', '.join(sorted(missing))}"] if missing else []
        told += [f"has unknown {', '.join(sorted(map(str, unknown)))}"] if unknown else []
        raise FitError(f"{where} {' and '.join(told)}; the inputs are {', '.join(sorted(needed))}")


def _check_tensor(
    value: Any, example: Tensor, dynamic: Mapping[int, str], what: str, index: int, name: str
) -> None:
    where = f"{what}, batch {index}, {name}"
    if not isinstance(value, Tensor):
        raise FitError(f"{where}: is a {type(value).__name__}, not a tensor")
    if value.dtype != example.dtype:
        raise FitError(
            f"{where}: dtype {value.dtype}, but the model was traced with {example.dtype}"
        )
    fixed = [d for d in range(example.ndim) if d not in dynamic]
    same = value.ndim == example.ndim and all(value.shape[d] == example.shape[d] for d in fixed)
    if not same:
        want = [dynamic.get(d, n) for d, n in enumerate(example.shape)]
        raise FitError(
            f"{where}: shape {list(value.shape)} does not fit {want} "
            "(trace with dynamic_shapes to vary a size)"
        )
    if value.numel() == 0:
        raise FitError(f"{where}: has no elements (shape {list(value.shape)})")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise FitError(f"{where}: has NaN or infinite values")


def set_aside(data: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(to train on, to choose the best state on): one batch in twelve, spread over the lengths.

    At most about `MOST_ASIDE` samples, or eight batches: each check reads all of them.
    """
    if len(data) < FEWEST:
        return data, data
    value = next(iter(data[0].values()))
    most = max(8, MOST_ASIDE // max(1, len(value) if value.ndim else 1))
    step = max(min(12, len(data) // 2), len(data) // most)
    chosen = set(range(step // 2, len(data), step))
    return [b for i, b in enumerate(data) if i not in chosen], [data[i] for i in sorted(chosen)]


def spread_out(data: list[Batch], seed: int) -> list[Batch]:
    """The batches in a seeded order: whatever is captured first stands for all lengths."""
    made = list(data)
    random.Random(seed).shuffle(made)
    return made
