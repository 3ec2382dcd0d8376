"""docs/mnist.md and its picture, from the rows of forms.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rewriter.outputs import write_text

DOCS = Path(__file__).parents[2] / "docs"
WITHIN = 0.005  # of softmax, after fine-tuning


def write(rows: Sequence[dict[str, Any]], fitting: int, tuning: int) -> None:
    done = [r for r in rows if "tuned" in r]
    softmax = next(r for r in done if r["form"] == "exact")
    draw(done, DOCS / "images" / "mnist.png")
    write_text(DOCS / "mnist.md", page(rows, done, softmax, fitting, tuning))


def page(
    rows: Sequence[dict[str, Any]],
    done: Sequence[dict[str, Any]],
    softmax: dict[str, Any],
    fitting: int,
    tuning: int,
) -> str:
    others = [r for r in done if r is not softmax]
    near = [r["form"] for r in others if r["tuned"] >= softmax["tuned"] - WITHIN]
    lines = [
        "# Every form in a small ViT on real digits",
        "",
        "Made by `python -m examples.mnist.forms --docs`. A ViT of four blocks (49 patches, width "
        "64, 4 heads) trained on 4,000 MNIST digits, tested on 1,000 others; all four attentions "
        f"are replaced. *Fitted*: without labels ({fitting} steps of all blocks). *Tuned*: "
        f"{tuning} steps on labelled, shifted digits (softmax too). One digit is 0.1 points: "
        "differences under a point are noise. *Error*: compiled against rewritten, largest. "
        "*Energy*: arithmetic of one image by `rewriter energy`'s rule `count`, an estimate.",
        "",
        f"Within 0.5 points of softmax after tuning ({softmax['tuned']:.1%}): {len(near)} of "
        f"{len(others)} forms ({', '.join(near)}).",
        "",
        "![accuracy of every form](images/mnist.png)",
        "",
        "| form | before | fitted | tuned | cosine of the fit | error | energy | artifact |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(done, key=lambda r: -r["tuned"]):
        cosine = row.get("cosine")
        lines.append(
            f"| `{row['form']}` | {row['before']:.1%} | {row['fitted']:.1%} | {row['tuned']:.1%} | "
            f"{'' if cosine is None else f'{cosine:.3f}'} | {row['error']:.0e} | "
            f"{row['microjoules']:.1f} uJ | {row['kilobytes']} kB |"
        )
    refused = [r for r in rows if "why" in r]
    if refused:
        lines += ["", "Refused here:", ""]
        lines += [f"- `{r['form']}`: {r['why']}" for r in refused]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One line a form: before, fitted and tuned accuracy."""
    ordered = sorted(rows, key=lambda r: r["tuned"])
    figure = Figure(figsize=(7.6, 0.9 + 0.28 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(ordered):
        axes.plot([row["before"], row["tuned"]], [at, at], color="#cccccc", zorder=1)
    for key, mark, colour in (
        ("before", "o", "#b0b0b0"), ("fitted", "D", "#e08a2e"), ("tuned", "o", "#2b6cb0"),
    ):  # fmt: skip
        values = [row[key] for row in ordered]
        axes.scatter(values, range(len(ordered)), marker=mark, color=colour, label=key, zorder=2)
    softmax = next(row for row in rows if row["form"] == "exact")
    axes.axvline(softmax["tuned"], color="#222222", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(ordered)), [row["form"] for row in ordered])
    axes.set_xlabel("share of 1,000 test digits named right")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
