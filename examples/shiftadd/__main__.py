"""Train the stages of EcoFormer and ShiftAddViT on digits, measure them, and write the page.

    python -m examples.shiftadd --docs     # about an hour and a half on one core, resumable
    python -m examples.shiftadd --page     # only docs/shiftadd.md and its picture, from the record

Weights and the record are kept in out/shiftadd after every stage; a killed run goes on from
there. A finished record is copied to examples/shiftadd/record.json by --docs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from examples.shiftadd.stages import OUT, SUBJECTS, rows, stages, train, weights_of
from rewriter.outputs import write_text
from rewriter.progress import shown

WORK = OUT / "record.json"
RECORD = Path(__file__).with_name("record.json")
Record = dict[str, Any]


def read(path: Path) -> Record:
    if not path.exists():
        return {"rows": [], "times": {}, "b0": [], "minilm": {}}
    record: Record = json.loads(path.read_text())
    return record


def keep(record: Record, path: Path = WORK) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1) + "\n")


def trained() -> None:
    """Every stage of every model that has no weights yet."""
    for subject in SUBJECTS.values():
        for stage in stages(subject):
            if weights_of(subject, stage.name).exists():
                continue
            with shown(f"{subject.name}: {stage.name}", Console(stderr=True)) as progress:
                train(subject, stage, progress)


def measured(record: Record) -> None:
    """What the record lacks: the rows, then their times together, then the rest."""
    from examples.shiftadd.measure import b0, figures, timed
    from examples.shiftadd.minilm import recovered

    for subject in SUBJECTS.values():
        known = {r["row"] for r in record["rows"] if r["model"] == subject.name}
        for stage in rows(subject):
            if stage.name not in known:
                record["rows"].append(figures(subject, stage))
                keep(record)
        if subject.name not in record["times"]:
            record["times"][subject.name] = timed(subject, rows(subject))
            keep(record)
    if not record["b0"]:
        record["b0"] = b0()
        keep(record)
    if not record["minilm"]:
        with shown("MiniLM", Console(stderr=True)) as progress:
            record["minilm"] = recovered(progress)
        keep(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true", help="then write the page and its picture")
    parser.add_argument("--page", action="store_true", help="write them from the kept record alone")
    given = parser.parse_args()
    if not given.page:
        torch.set_num_threads(1)
        trained()
        record = read(WORK)
        measured(record)
        if given.docs:
            keep(record, RECORD)
    if given.docs or given.page:
        from examples.shiftadd.page import write

        write(read(RECORD))


if __name__ == "__main__":
    main()
