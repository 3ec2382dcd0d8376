"""Recall as a table, a page of docs/ and a picture: accuracy against the number of pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from passes.decode_form import Streaming
from passes.form import form_named, forms
from rewriter.line_labels import family_legend, lines_of, name_ends
from rewriter.recall import VALUES, Cell, Score, recall_site, scores
from rewriter.record import save_picture


def table(cells: Sequence[Cell]) -> Table:
    """Forms by rows, numbers of pairs by columns: means over the seeds at each form's best rate."""
    made = Table(title="associative recall: share of questions answered right")
    pairs = sorted({c.pairs for c in cells})
    made.add_column("form")
    for count in pairs:
        made.add_column(f"{count} pairs", justify="right")
    found = {(s.form, s.pairs): f"{s.mean:.3f}" for s in scores(cells)}
    for name in dict.fromkeys(c.form for c in cells):
        made.add_row(name, *(found.get((name, n), "refused") for n in pairs))
    return made


def refusals(cells: Sequence[Cell]) -> list[str]:
    """Why forms are missing, each once."""
    return list(dict.fromkeys(c.why for c in cells if c.why))


def page(data: Mapping[str, Any], cells: Sequence[Cell], image: str) -> str:
    """The text of docs/recall.md from a record and the path of its picture."""
    setup, pairs, found = data["setup"], data["pairs"], scores(cells)
    chance = f"{1 / VALUES:.3f}"
    lines = [
        "# Associative recall",
        "",
        "Written by `python -m rewriter.docs` from rewriter/records/recall.json, which",
        "`rewriter recall --forms all --record rewriter/records/recall.json` makes.",
        "",
        "A sequence shows keys, each followed by a value, and then asks for all keys in another",
        "order (multi-query associative recall, Arora et al. 2023). The answer is one of "
        f"{VALUES} values: {chance} is chance.",
        "",
        f"The model: {setup['layers']} layer, width {setup['width']}, {setup['heads']} heads, "
        "a short convolution before the attention, no positions, no MLP. It is trained from "
        f"scratch for {setup['steps']} steps of {setup['batch']} sequences, the numbers of pairs "
        f"by turns, at the rates {', '.join(str(r) for r in setup['rates'])} with "
        f"{setup['seeds']} seeds each. Shown is the better rate: the mean over the seeds, in "
        "brackets the least and the largest. **State** is what a head keeps of "
        f"{3 * max(pairs)} tokens when it generates, in numbers; empty where "
        "`compile --decode` does not take the form.",
        "",
        f"| form | state | {' | '.join(f'{n} pairs' for n in pairs)} | rate |",
        f"|---|---:|{'---:|' * (len(pairs) + 1)}",
    ]
    for name, own in _ordered(found):
        told = [f"{s.mean:.2f} ({s.least:.2f}-{s.largest:.2f})" for s in own]
        state = _state(name, setup, max(pairs))
        lines.append(f"| {name} | {state} | {' | '.join(told)} | {own[0].rate} |")
    lines += ["", *_compared(found, "rebased", "taylor"), *_cautions()]
    if why := refusals(cells):
        lines += ["", "Not in a causal model:", "", *(f"- {reason}" for reason in why)]
    if missing := sorted(set(forms()) - {c.form for c in cells}):
        lines += ["", f"Not measured yet: {', '.join(f'`{name}`' for name in missing)}."]
    return "\n".join([*lines, "", f"![Recall against pairs]({image})", ""])


def _ordered(found: Sequence[Score]) -> list[tuple[str, list[Score]]]:
    """Forms by their mean over all pairs, best first."""
    rows = {name: [s for s in found if s.form == name] for name in {s.form for s in found}}
    return sorted(rows.items(), key=lambda row: (-sum(s.mean for s in row[1]), row[0]))


def _state(name: str, setup: Mapping[str, Any], pairs: int) -> str:
    """Numbers a head keeps of 3 * `pairs` tokens."""
    form, heads = form_named(name), setup["heads"]
    site = recall_site(setup["width"] // heads, heads, 1, 3 * pairs)
    if not isinstance(form, Streaming) or not form.streams(site):
        return ""
    return f"{sum(math.prod(s.shape) for s in form.state(site, 3 * pairs)) // heads:,}"


def _compared(found: Sequence[Score], mine: str, other: str) -> list[str]:
    """What the seeds say of two forms, number of pairs by number of pairs."""
    by = {(s.form, s.pairs): s for s in found}
    both = [n for (form, n) in by if form == mine and (other, n) in by]
    if not both:
        return []
    told = {"above": [], "below": [], "level": []}  # type: dict[str, list[str]]
    for n in both:
        a, b = by[mine, n], by[other, n]
        word = "above" if a.least > b.largest else "below" if a.largest < b.least else "level"
        told[word].append(str(n))
    words = "; ".join(f"{word} at {', '.join(ns)} pairs" for word, ns in told.items() if ns)
    line = f"`{mine}` (ReBased) against `{other}` (Based), all seeds of one against all of the "
    return [f"{line}other: {words}.", ""]


def _cautions() -> list[str]:
    return [
        "The training is short: a low figure may mean that a form learns slowly, not only that its",
        "state is too small (where seeds differ much, one of them had not left the first plateau).",
        "With 1,500 steps and one other seed `taylor` (rate 0.005) answered 0.99 at 32 pairs and",
        "0.89 at 64, `rebased` (rate 0.01) 1.00 and 0.98: most of the gap between them is speed of",
        "learning.",
        "`lolcats` sees 128 tokens by softmax: up to 42 pairs it is exact attention. `window` and",
        "`diag_block` see 64: from 32 pairs on the questions of `diag_block` stand in another",
        "block than their answers, and `window` reaches a part of them.",
    ]


def picture(cells: Sequence[Cell], path: Path) -> None:
    """A PNG (or what the suffix says); `ArtifactError` where it can not be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 7.0), layout="constrained")
    axes = figure.subplots()
    lines = lines_of({n: {s.pairs: s.mean for s in own} for n, own in _ordered(scores(cells))})
    for line in lines:
        line.draw(axes)
    axes.set_xscale("log", base=2)
    ticks = sorted({c.pairs for c in cells})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("pairs shown")
    axes.set_ylabel("questions answered right")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    family_legend(axes, lines, "lower left")
    name_ends(axes, lines)
    save_picture(figure, path)
