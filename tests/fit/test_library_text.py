"""Text of installed libraries: docstrings, read without importing anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter import library_text
from rewriter.calibration import split_sentences
from rewriter.library_text import library_paragraphs

SOURCE = '''"""What the first module of this library is about."""
raise RuntimeError("nobody imports this")

NOT_ONE = """a long string that stands behind an equals sign"""

def f(x):
    r"""Return the double of a number that is given.

    Something that was said in another place already.

    >>> f(1) gives two and not any other number
    | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 | 6.0 | 7.0 |

    12 + 13 = 25, 14 + 15 = 29, 16 + 17 = 33, 18
    """

class A:
    \'\'\'A class whose quotes are single but three of them.\'\'\'
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    root = tmp_path / "a_library_of_words"
    (root / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text(SOURCE)
    (root / "latin.py").write_bytes(b'"""The bytes \xe9 of this file are not UTF-8 at all."""')
    (root / "tests" / "case.py").write_text('"""Nobody wants to read what a test says."""')
    monkeypatch.syspath_prepend(str(tmp_path))
    return root.name


def by_blank_lines(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n")]


def test_docstrings_of_prose_each_once_without_an_import(library: str) -> None:
    known = {"Something that was said in another place already."}
    found = library_paragraphs(by_blank_lines, known, [library, "no_such_library", library])
    assert sorted(found) == [
        "A class whose quotes are single but three of them.",
        "Return the double of a number that is given.",
        "What the first module of this library is about.",
    ]


def test_no_library_is_most_of_the_text(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_text, "MOST", 2)
    found = library_paragraphs(by_blank_lines, (), [library])
    assert len(found) == 2
    assert found == library_paragraphs(by_blank_lines, (), [library])


def test_what_is_held_out_stays_held_out() -> None:
    fit, held = split_sentences()
    few, same = split_sentences(libraries=False)
    assert same == held
    assert set(few) < set(fit)
    assert len(fit) == len(set(fit))
    assert not set(fit) & set(held)
