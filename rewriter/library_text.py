"""More text to fit on: the documentation inside installed libraries, read without importing them.

A fit of ten minutes on the standard library's docstrings alone overfits (docs/fitting.md).
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

# Those this project needs, and others of many words that are often beside them.
LIBRARIES = (
    "networkx", "numpy", "torch", "transformers", "tvm", "scipy", "sklearn", "sympy", "matplotlib",
    "pandas", "rich", "jinja2", "onnxruntime", "openvino",
)  # fmt: skip
MOST = 800  # paragraphs of one library: together about as many as the standard library has
PROSE = 0.7  # share of letters and spaces below which a paragraph is a table or code
# After a colon at a line's end, or first in the file. Finding them by this takes a hundredth of
# the time of parsing; a string that is taken for a docstring by mistake does no harm.
_DOCSTRING = re.compile(r"(?:\A|:[ \t]*\n)\s*[rR]?(\"\"\"|''')(.*?)\1", re.DOTALL)

Split = Callable[[str], Iterable[str]]


def library_paragraphs(
    paragraphs: Split, known: Collection[str], libraries: Iterable[str] = LIBRARIES
) -> list[str]:
    """Paragraphs of the docstrings of those of `libraries` that are installed, each once.

    Args:
        paragraphs: splits a docstring.
        known: paragraphs that are left out (those of other documents).
        libraries: top-level packages.

    Returns:
        The same list on every call; empty where none is installed with its sources.
    """
    made: list[str] = []
    seen = set(known)
    for name in libraries:
        found = [p for text in _docstrings(name) for p in paragraphs(text)]
        new = [p for p in dict.fromkeys(found) if p not in seen]
        random.Random(name).shuffle(new)
        made += itertools.islice(filter(_is_prose, new), MOST)
        seen.update(new)
    return made


def _docstrings(library: str) -> Iterator[str]:
    for path in sorted(_sources(library)):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        for match in _DOCSTRING.finditer(text):
            yield match.group(2)


def _sources(library: str) -> Iterator[Path]:
    try:
        spec = importlib.util.find_spec(library)
    except (ImportError, ValueError):
        return
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        root = Path(folder)
        for path in root.rglob("*.py"):
            if not any("test" in part for part in path.relative_to(root).parts):
                yield path


def _is_prose(paragraph: str) -> bool:
    plain = sum(c.isalpha() or c == " " for c in paragraph)
    return plain >= PROSE * len(paragraph) and ">>>" not in paragraph
