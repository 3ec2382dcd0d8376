"""What a form costs, from its closed count, and how faithful it was measured to be, from records.

The records are JSON files in ``rewriter/records/`` (``python -m benchmarks.forms`` writes
``form_fidelity.json``, with ``--fit`` ``form_after_fit.json``). Each has "settings" (a sentence
about how it was measured) and "forms" by name, each with "output_error" (not after a fit, which
changes the weights that make queries, keys and values), "cosine" or "why".
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from passes.form import Form
from passes.forms.exact import Exact
from passes.site import AttentionSite, Dims, Mask

RECORDS = Path(__file__).parent / "records"
BEFORE, AFTER = RECORDS / "form_fidelity.json", RECORDS / "form_after_fit.json"
TOKENS, WIDTH = 1024, 64


def site_of(tokens: int) -> AttentionSite:
    """One head of 64 channels and so many tokens, without any mask."""
    dims = Dims(1, 1, 1, tokens, tokens, WIDTH, WIDTH)
    return AttentionSite("cost#0", "cost", dims, "float32", WIDTH**-0.5, Mask())


def cost(form: Form) -> dict[str, Any] | None:
    """Operations at 1024 tokens (all kinds), in parts of exact attention's, and their growth.

    "growth" is the factor for twice the tokens. None for a form that refuses such a site.
    """
    sites = [site_of(TOKENS), site_of(2 * TOKENS)]
    reduced = [replace(s, reduced=True) for s in sites]
    taken = next((pair for pair in (sites, reduced) if form.applies(pair[0])), None)
    if taken is None:
        return None
    one, two = (form.ops(s).total() for s in taken)
    return {
        "tokens": TOKENS,
        "operations": one,
        "of_exact": one / Exact().ops(sites[0]).total(),
        "growth": two / one,
    }


def told_cost(found: dict[str, Any] | None) -> str:
    """The cost as one line of text."""
    if found is None:
        return "not defined for a plain site"
    return (
        f"{found['operations'] / 1e6:.1f} M operations at {found['tokens']} tokens "
        f"({found['of_exact']:.2f} of exact attention), times {found['growth']:.2f} for twice as "
        f"many tokens"
    )


@functools.cache
def record(path: Path) -> dict[str, Any]:
    """A record; empty where the file is not there."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {"settings": "", "forms": {}}
    return found


def fidelity(name: str) -> dict[str, Any]:
    """{"without fit": row or None, "after fit": row or None} of a form."""
    pairs = (("without fit", BEFORE), ("after fit", AFTER))
    return {when: record(path)["forms"].get(name) for when, path in pairs}


def told_fidelity(found: dict[str, Any]) -> str:
    """The fidelity as one line of text."""
    parts = []
    for when, row in found.items():
        if row is None:
            parts += [] if when == "after fit" else [f"{when} not measured"]
        elif row.get("why"):
            parts.append(f"{when} none ({row['why']})")
        else:
            error = _number(row.get("output_error"))
            told = f" output error {error}," if error else ""
            parts.append(f"{when}{told} cosine {_number(row.get('cosine'))}")
    return "; ".join(parts)


def cells(found: dict[str, Any]) -> list[str]:
    """Output error and cosine without a fit and cosine after one, for a table."""
    before, after = (found[when] or {} for when in ("without fit", "after fit"))
    return [
        _number(v)
        for v in (before.get("output_error"), *(r.get("cosine") for r in (before, after)))
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
