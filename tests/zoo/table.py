"""docs/model-zoo.md from the zoo: `python -m tests.zoo.table` writes it.

Its lines are what the compiler reports, not the expectations. test_zoo.py compares each with the
committed one.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from passes.find import Found
from tests.zoo.check import ENTRIES, run
from tests.zoo.entry import Entry

PATH = Path(__file__).parents[2] / "docs" / "model-zoo.md"
_HEAD = """# Model zoo

What is found in small random-weight configurations of real models. Written by
`python -m tests.zoo.table`; `tests/zoo/` holds the expectations, derived from each model's code,
and checks every site exactly (id, mask, sizes, scale, dropout) and that the canonical graph gives
the model's own numbers, with fixed and with dynamic sizes.

`cross`: keys and queries are made from different activations (a decoder over an encoder's
output); keys that are a reduced copy of the queries' own tokens are not. `found by`: `sdpa`,
torch's own operator; `softmax`, written out as matmul, softmax, matmul. `dynamic`: axes
that may change after tracing.

| Model | Code | Sites | Mask | Cross | Heads (key heads) | Found by | Near misses | Dynamic |
|---|---|---|---|---|---|---|---|---|
"""


def row(entry: Entry, attn: str, found: Found) -> str:
    """The table's line of one model in one implementation."""
    heads = {f"{s.dims.H} ({s.dims.G})" if s.dims.G != s.dims.H else str(s.dims.H)
             for s in found.sites}  # fmt: skip
    dynamic = {n for axes in (entry.dynamic or {}).values() for n in axes.values()}
    cells = (
        entry.name,
        attn,
        str(len(found.sites)),
        counted(s.mask.kind for s in found.sites),
        str(sum(s.cross for s in found.sites) or ""),
        ", ".join(sorted(heads)),
        ", ".join(sorted({s.found_by for s in found.sites})),
        "; ".join(m.reason for m in found.near_misses),
        ", ".join(sorted(dynamic)),
    )
    return "| " + " | ".join(cells) + " |"


def counted(words: Iterable[str]) -> str:
    """ "2 none, 1 causal" in the order of first appearance; the bare word if all are alike."""
    counts = Counter(words)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{n} {word}" for word, n in counts.items())


def row_key(line: str) -> tuple[str, str]:
    """Model and implementation of a line."""
    cells = [c.strip() for c in line.strip("|").split("|")]
    return cells[0], cells[1]


def committed() -> dict[tuple[str, str], str]:
    """The lines of the committed table by model and implementation."""
    text = PATH.read_text() if PATH.exists() else ""
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return {row_key(r): r for r in rows}


def head() -> str:
    """The text above the lines."""
    return _HEAD


def main() -> None:
    """Write the table."""
    warnings.simplefilter("ignore")
    rows = [row(e, a, run(e, a)[-1]) for e in ENTRIES for a in e.attn]
    PATH.write_text(_HEAD + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
