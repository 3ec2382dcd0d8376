"""docs/mnist.md and its picture, from the rows of forms.py; nothing is trained.

    python -m examples.mnist.page

Rows of out/mnist/ go into examples/mnist/results.json, and the page is made from that file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from examples.mnist.forms import BATCH, RATES, RECIPE, ROWS
from passes.form import forms
from rewriter.energy import KINDS
from rewriter.outputs import write_text

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = Path(__file__).with_name("results.json")
WITHIN = 0.005  # of softmax, after fine-tuning
SLACK = 1e-6  # shares of 1,000 digits are not exact in floating point
SAME = 0.9995  # cosine of the logits of a form that does what softmax does
NARROW = 0.06  # below softmax, what the right side of the picture shows
MARKS = (("before", "o", "#b0b0b0"), ("fitted", "D", "#e08a2e"), ("tuned", "o", "#2b6cb0"))

Row = Mapping[str, Any]


def recorded(results: Path = RESULTS, rows: Path = ROWS) -> list[dict[str, Any]]:
    """Rows of `results`, those in the folder `rows` in place of older ones; by form and seed."""
    kept = json.loads(results.read_text())["rows"] if results.exists() else []
    new = [json.loads(path.read_text()) for path in rows.glob("*.json")]
    found = {(row["form"], row["seed"]): row for row in [*kept, *new]}
    return [found[key] for key in sorted(found)]


def grouped(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row a form, best first: means over its seeds, `runs` the tuned accuracies by seed."""
    by_form: dict[str, list[Row]] = {}
    for row in rows:
        if "tuned" in row:
            by_form.setdefault(row["form"], []).append(row)
    made = []
    for runs in by_form.values():
        means = {key: mean(row[key] for row in runs) for key in ("before", "fitted", "tuned")}
        made.append({**runs[0], **means, "runs": [row["tuned"] for row in runs]})
    return sorted(made, key=lambda row: (-row["tuned"], row["form"]))


def near(done: Sequence[Row]) -> list[str]:
    """Forms that end within 0.5 points of softmax (or above it), best first."""
    softmax = _softmax(done)["tuned"]
    return [
        row["form"]
        for row in done
        if row["form"] != "exact" and row["tuned"] >= softmax - WITHIN - SLACK
    ]


def page(rows: Sequence[Row], missing: Sequence[str] = ()) -> str:
    """The text of docs/mnist.md; `missing` are forms without a row."""
    done = grouped(rows)
    found, softmax = near(done), _softmax(done)
    lines = [
        "# Forms of attention in a small ViT on real digits",
        "",
        "Made by `python -m examples.mnist.page` from `examples/mnist/results.json`, which "
        "`python -m examples.mnist.forms` measured (about "
        f"{mean(row['cpu_seconds'] for row in done):.0f} seconds of one core a form).",
        "",
        f"**{len(found)} of {len(done) - 1} forms end within 0.5 points of softmax** after "
        f"fine-tuning (softmax {softmax['tuned']:.1%}): {', '.join(f'`{n}`' for n in found)}.",
        "",
        "![accuracy of every form](images/mnist.png)",
        "",
        "A ViT of four blocks (49 patches, width 64, 4 heads, 140 k parameters) trained on 3,600 "
        "digits of MNIST; every number is of 1,000 others. All four attentions are replaced.",
        "",
        "- *before*: the form put in, nothing trained.",
        f"- *fitted*: {RECIPE.block_steps} steps of all attention blocks towards the original's "
        f"and {RECIPE.end_steps} of the whole model, {BATCH} digits each, without labels. "
        "*cosine*: of the logits to those of the original, then.",
        f"- *tuned*: {RATES.steps} steps more on labelled digits, moved by up to two pixels. The "
        "best of ten states is kept by the loss on 400 digits that nothing was trained on; the "
        "rates, one recipe for all forms, were chosen by that loss too. Softmax is tuned alike.",
        "- *operations* and *energy*: multiplications, additions and shifts of one digit, counted "
        "and priced by `rewriter energy --model count`: an estimate without memory, and without "
        "exponentials and divisions, which have no price there.",
        "- *artifact*: size of the compiled file. *error*: compiled against tuned model, largest "
        "difference of a logit.",
        "",
        "One digit is 0.1 points, and the standard error of 98 % of 1,000 is 0.4: differences of "
        "that size say nothing." + _seeds(done) + _same(done),
        "",
        "| form | before | fitted | cosine | tuned | operations | energy | artifact | error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_line(row) for row in done]
    refused = sorted((row for row in rows if "why" in row), key=lambda row: str(row["form"]))
    if refused:
        lines += ["", "Forms that refuse these sites:", ""]
        lines += [f"- `{row['form']}`: {row['why']}" for row in refused]
    below = [row["form"] for row in reversed(done) if row["form"] not in [*found, "exact"]]
    if below:
        names = ", ".join(f"`{name}`" for name in below)
        lines += ["", f"More than 0.5 points below softmax: {names}."]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(f'`{name}`' for name in missing)}."]
    return "\n".join(lines) + "\n"


def _seeds(done: Sequence[Row]) -> str:
    several = [len(row["runs"]) for row in done if len(row["runs"]) > 1]
    if not several:
        return " One seed."
    return " Forms with a range in brackets ran with several seeds: mean (lowest to highest)."


def _same(done: Sequence[Row]) -> str:
    """Which forms do what softmax does before anything is trained."""
    first = _softmax(done)["before"]
    same = [r["form"] for r in done if r["before"] == first and r.get("cosine", 0) > SAME]
    if not same:
        return ""
    names = ", ".join(f"`{name}`" for name in same)
    return (
        f" Softmax before anything is trained, so that nothing was to be won back: {names} (by "
        "their first parameters, or because their window or blocks hold all 49 tokens)."
    )


def _line(row: Row) -> str:
    """One form of the table."""
    operations = sum(row["operations"].get(kind, 0) for kind in KINDS) / 1e6
    tuned = f"{row['tuned']:.1%}"
    if len(row["runs"]) > 1:
        low, high = min(row["runs"]) * 100, max(row["runs"]) * 100
        tuned += f" ({low:.1f} to {high:.1f}, {len(row['runs'])} seeds)"
    cosine = f"{row['cosine']:.3f}" if "cosine" in row else ""
    name = "`exact` (softmax)" if row["form"] == "exact" else f"`{row['form']}`"
    cells = [
        name, f"{row['before']:.1%}", f"{row['fitted']:.1%}", cosine, tuned,
        f"{operations:.1f} M", f"{row['microjoules']:.1f} uJ", f"{row['kilobytes']} kB",
        f"{row['error']:.0e}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _softmax(done: Sequence[Row]) -> Row:
    return next(row for row in done if row["form"] == "exact")


def draw(rows: Sequence[Row], path: Path) -> None:
    """PNG at `path`: left all accuracies of a form from 0 to 1, right tuned ones near softmax."""
    done = grouped(rows)[::-1]
    places = range(len(done))
    softmax = _softmax(done)["tuned"]
    figure = Figure(figsize=(9.6, 1.2 + 0.25 * len(done)), layout="constrained")
    wide, close = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for at, row in enumerate(done):
        wide.plot([row["before"], row["tuned"]], [at, at], color="#dddddd", zorder=1)
        close.plot([min(row["runs"]), max(row["runs"])], [at, at], color="#2b6cb0", zorder=1)
    for key, mark, colour in MARKS:
        values = [row[key] for row in done]
        wide.scatter(values, places, s=26, marker=mark, color=colour, label=key, zorder=2)
    close.axvspan(softmax - WITHIN, softmax + WITHIN, color="#2b6cb0", alpha=0.12, linewidth=0)
    close.axvline(softmax, color="#222222", linewidth=0.8, linestyle=":")
    close.scatter([row["tuned"] for row in done], places, s=26, color="#2b6cb0", zorder=2)
    wide.set_yticks(places, [row["form"] for row in done])
    wide.set_xlim(0, 1.02)
    wide.set_xlabel("share of 1,000 test digits named right")
    close.set_xlim(softmax - NARROW, softmax + 0.012)
    close.set_xlabel("tuned, near softmax; shaded: within 0.5 points")
    for axes in (wide, close):
        axes.set_ylim(-0.7, len(done) - 0.3)
        axes.grid(axis="x", color="#eeeeee", zorder=0)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.legend(*wide.get_legend_handles_labels(), loc="outside upper left", ncols=3,
                  frameon=False)  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    rows = recorded()
    missing = sorted(set(forms()) - {row["form"] for row in rows})
    write_text(RESULTS, json.dumps({"rows": rows, "missing": missing}, indent=1) + "\n")
    draw(rows, DOCS / "images" / "mnist.png")
    write_text(DOCS / "mnist.md", page(rows, missing))


if __name__ == "__main__":
    main()
