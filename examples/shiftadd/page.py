"""docs/shiftadd.md and its picture, from the record of `python -m examples.shiftadd`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.shiftadd.stages import LATENCIES, SUBJECTS, allowed, rows
from rewriter.outputs import write_text

DOCS = Path(__file__).parents[2] / "docs"
# Points of accuracy below softmax that each row may lose.
BARS = {"hamming": 1.0, "shiftadd": 1.0, "shiftadd + moe": 2.0}
LESS = 0.60  # of the energy of softmax on all tokens, B0 with hamming
INK, FAINT = "#1c2430", "#5b6575"
COLOURS = {"softmax": "#8a94a6", "hamming": "#2b6cb0", "shiftadd": "#2f7d5b",
           "shiftadd + shift": "#e08a2e", "shiftadd + moe": "#a23b72"}  # fmt: skip
Row = Mapping[str, Any]


def write(record: Mapping[str, Any]) -> None:
    draw(record, DOCS / "images" / "shiftadd.png")
    write_text(DOCS / "shiftadd.md", page(record))


def of(record: Mapping[str, Any], model: str) -> list[Row]:
    """The rows of a model with their times, softmax first."""
    times = record["times"][model]
    return [{**r, **times[r["row"]]} for r in record["rows"] if r["model"] == model]


def page(record: Mapping[str, Any]) -> str:
    parts = [
        INTRODUCTION,
        "![accuracy and energy of every row](images/shiftadd.png)",
        "Lines: softmax, and one and two points below it.",
    ]
    for name, subject in SUBJECTS.items():
        most = ", ".join(f"{s.name} {allowed(subject, s.name):,}" for s in rows(subject))
        steps = f"Steps at most: {most}."
        parts += [
            f"## {subject.title} on digits",
            f"{ABOUT[name]} {steps}",
            table(of(record, name)),
        ]
    parts += ["## What was asked", "\n".join(verdicts(record))]
    parts += ["## PVT v2 B0 at 224 pixels", B0, b0_table(record["b0"])]
    if record["minilm"]:
        parts += ["## MiniLM with hamming", minilm(record["minilm"])]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = f"""# Hashed attention, shift layers and mixtures, trained

Made by `python -m examples.shiftadd --docs`; `--page` makes it again from the record in
examples/shiftadd. The stages of EcoFormer and ShiftAddViT on a small scale: softmax, `hamming`,
`shiftadd` attention, then shift layers or mixtures (`moe`) for all linear layers but the head, from
the weights of `shiftadd`.

Every row is trained on the same 3,600 digits, in parts: attention, then more of it, linear layers.
No row may take more steps than softmax; a part ends early where nothing gets better or its time is
over, and the best state counts. *Steps* are those of the last part. 400 other digits choose the
best state, hashes are learned again every epoch (`refresh=1`), 1,000 digits that no choice was made
on are the test: one digit is 0.1 points, and the standard error of a row is about half a point.
Mixtures are balanced for latencies {LATENCIES[0]:g} to {LATENCIES[1]:g}, as published.

*Operations* and *count* are those of one image by `rewriter energy`, a mixture's with the share of
tokens that its routers send to the shifts; *eyeriss* is the accelerator model, with data movement.
Both are estimates. *Time* is one image on one thread, compiled, all rows by turns in one process,
as a ratio to softmax with its middle half. *Error*: compiled against rewritten, largest."""
ABOUT = {
    "vit": "examples/mnist's model: four blocks of width 64 on 49 tokens, 4 heads. In all parts "
    "but the first, half of the loss is the distance to the original's outputs (distillation), "
    "and every digit is seen at twelve places.",
    "pvt": "Four stages of one block, widths 16 to 64, on 256, 64, 16 and 4 tokens. Its reduced "
    "attention is first exchanged for softmax on all tokens and trained; all rows start from "
    "there. The last stage keeps its softmax, as in the papers.",
}
B0 = (
    "Operations of one image by EcoFormer's rule, as `rewriter energy pvt_v2_b0 --form ... "
    "--linear ...` counts them; nothing was trained. Mixtures are counted as balanced."
)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| row | accuracy | steps | mul | add | shift | count | eyeriss | linear weights "
        "| artifact | time | error | to shift |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        share = "" if r["to_shift"] is None else f"{r['to_shift']:.0%}"
        spread = f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}"
        time = f"{r['ms']:.2f} ms" if r is rows[0] else f"{r['ratio']:.2f} ({spread})"
        lines.append(
            f"| {r['row']} | {r['accuracy']:.1%} | {r['steps']:,} | {_counts(r)} | "
            f"{r['count_uj']:.1f} uJ | {r['eyeriss_uj']:.0f} uJ | "
            f"{r['weight_bytes'] / 1000:.0f} kB | {r['kilobytes']:.0f} kB | {time} | "
            f"{r['error']:.0e} | {share} |"
        )
    return "\n".join(lines)


def _counts(row: Row) -> str:
    return " | ".join(f"{row[kind] / 1e6:.2f} M" for kind in ("mul", "add", "shift"))


def b0_table(rows: Sequence[Row]) -> str:
    lines = ["| row | mul | add | shift | count | linear weights |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['row']} | {_counts(r)} | {r['count_uj'] / 1000:.3f} mJ | "
        f"{r['weight_bytes'] / 1e6:.1f} MB |"
        for r in rows
    ]
    return "\n".join(lines)


def verdicts(record: Mapping[str, Any]) -> list[str]:
    """One line a bar: what it was, what was measured, whether it holds."""
    lines = []
    for name, subject in SUBJECTS.items():
        found = {r["row"]: r for r in of(record, name)}
        softmax = found["softmax"]["accuracy"]
        for row, bar in BARS.items():
            lost = round(100 * (softmax - found[row]["accuracy"]), 1)
            word = "holds" if lost <= bar else "missed"
            lines.append(
                f"- {subject.title}, {row}: within {bar:g} points of softmax: **{word}**, "
                f"{found[row]['accuracy']:.1%} against {softmax:.1%}."
            )
    saved = saving(record["b0"])
    word = "holds" if saved >= LESS else "missed"
    lines.append(
        f"- PVT v2 B0 at 224 pixels, hamming: at least {LESS:.0%} less energy than softmax on all "
        f"tokens by `count`: **{word}**, {saved:.1%} less (published: 73 %)."
    )
    return lines


def saving(rows: Sequence[Row]) -> float:
    """The part of the energy of softmax on all tokens that hamming saves."""
    known = {r["row"]: r["count_uj"] for r in rows}
    return float(1 - known["hamming"] / known["softmax on all tokens"])


def minilm(facts: Row) -> str:
    return (
        f"Mean cosine of held-out sentence embeddings with the original's: {facts['before']:.3f} "
        f"before, {facts['fitted']:.3f} after a fit without labels of "
        f"{facts['fit_seconds'] / 60:.0f} minutes on {facts['threads']} threads, "
        f"{facts['tuned']:.3f} after another {facts['tune_seconds']:.0f} seconds "
        f"({facts['tune_steps']} steps) of fine-tuning towards the original's outputs on "
        f"{facts['texts']} unlabelled texts, hashes learned again every {facts['epoch']} steps. "
        f"The machine was shared: the fit got {facts['fit_cpu']:.0f} processor-seconds and the "
        f"fine-tuning {facts['tune_cpu']:.0f}, so the same minutes give more on a quiet one."
    )


def draw(record: Mapping[str, Any], path: Path) -> None:
    """A panel for each model: energy by `count` to the right, accuracy upwards."""
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    for axes, (name, subject) in zip(figure.subplots(1, 2), SUBJECTS.items(), strict=True):
        rows = of(record, name)
        for r in rows:
            axes.scatter(
                r["count_uj"], 100 * r["accuracy"], s=60, color=COLOURS[r["row"]],
                label=f"{r['row']}  ({r['ratio']:.2f} of the time)", zorder=2,
            )  # fmt: skip
        softmax = 100 * rows[0]["accuracy"]
        for below, style in ((0, "-"), (1, "--"), (2, ":")):
            axes.axhline(softmax - below, color="#c4cad4", linewidth=0.8, linestyle=style, zorder=1)
        low = min(100 * r["accuracy"] for r in rows)
        axes.set_ylim(min(low, softmax - 2) - 0.6, max(100 * r["accuracy"] for r in rows) + 0.6)
        axes.set_xlim(0, 1.12 * max(r["count_uj"] for r in rows))
        axes.set_title(subject.title, color=INK, fontsize=11)
        axes.set_xlabel("energy of one image by `count`, microjoules", color=FAINT, fontsize=9)
        axes.set_ylabel("test digits named right, per cent", color=FAINT, fontsize=9)
        axes.tick_params(labelsize=8, colors=INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(
            frameon=False, fontsize=8, labelcolor=INK, ncol=2, loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
