"""`rewriter forms`: the forms of attention there are, and from how many tokens on each pays."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from passes.errors import UnknownName, UsageError
from rewriter.cli import options as o
from rewriter.cli.output import console, print_json

MARKS = {
    "bidirectional": "full", "causal": "causal", "padding": "pad", "window": "win",
    "bias": "bias", "cross": "cross", "GQA": "GQA", "generation": "gen",
}  # fmt: skip
Names = Annotated[
    list[str] | None, typer.Argument(metavar="[FORM]...", help="Show these in full; or all.")
]
Lengths = Annotated[str, typer.Option(help="Tokens to measure at, by commas.")]
Record = Annotated[
    Path | None, typer.Option("--record", help="JSON kept after every form; gone on from.")
]
Picture = Annotated[Path | None, typer.Option("--picture", help="Draw time against tokens (.png).")]


def verb(
    names: Names = None,
    break_even: Annotated[
        bool, typer.Option("--break-even", help="Measure each form against exact attention here.")
    ] = False,
    heads: Annotated[int, typer.Option(help="Heads of the measured site.", min=1)] = 4,
    width: Annotated[int, typer.Option(help="Width of a head.", min=1)] = 64,
    causal: Annotated[bool, typer.Option("--causal", help="Measure causal attention.")] = False,
    lengths: Lengths = "512,1024,2048,4096,8192,16384",
    record: Record = None,
    picture: Picture = None,
    target: o.Target = "cpu",
    json: o.Json = False,
) -> None:
    """List the forms: what each needs, which masks it carries; by name its cost and fidelity too.

    Example: rewriter forms hedgehog elu --break-even --lengths 512,2048,8192
    """
    rows = _chosen(names)
    if break_even:
        chosen = [row["name"] for row in rows]
        _measure(chosen, (heads, width, causal), lengths, target, record, picture, json)
        return
    if json:
        print_json({"forms": rows})
        return
    if names:
        for row in rows:
            _full(row)
        return
    console.print(_overview(rows))


def _chosen(names: list[str] | None) -> list[dict[str, Any]]:
    rows = form_rows()
    if names == ["all"]:
        return rows
    known = [row["name"] for row in rows]
    for name in names or []:
        if name not in known:
            raise UnknownName("form", name, known)
    return [row for row in rows if not names or row["name"] in names]


def _overview(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="forms of attention", caption="rewriter forms NAME shows one in full",
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column in ("form", "kind", "needs", "carries"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        softmax = "exact" if row["exact"] else "softmax"
        kind = softmax if row["family"] == "exact" else row["family"]
        carries = " ".join(
            short if mark in row["carries"] else " " * len(short) for mark, short in MARKS.items()
        )
        table.add_row(row["name"], kind, row["needs"], carries)
    return table


def _full(row: dict[str, Any]) -> None:
    from rewriter.form_facts import told_cost, told_fidelity

    kind = "exact" if row["exact"] else "approximate"
    options = ", ".join(f"{k}={v}" for k, v in row["options"].items()) or "none"
    console.print(f"[bold]{row['name']}[/bold]")
    for label, text in (
        ("formula", row["formula"]),
        ("kind", f"{row['family']}, {kind}; needs {row['needs']}"),
        ("cost", told_cost(row["cost"])),
        ("fidelity", told_fidelity(row["fidelity"])),
        ("carries", ", ".join(row["carries"])),
        ("options", options),
        ("source", f"{row['paper']} {row['link']}"),
    ):
        console.print(f"  {label:8s} {text}", markup=False, highlight=False)


def _measure(
    names: list[str],
    site: tuple[int, int, bool],
    lengths: str,
    target: str,
    record: Path | None,
    picture: Path | None,
    json: bool,
) -> None:
    from codegen.target import target_named
    from rewriter.break_even import Shape, break_even
    from rewriter.break_even_view import picture as draw
    from rewriter.break_even_view import table
    from rewriter.cli.work import progress_bar
    from rewriter.outputs import check_file

    check_file(record, "--record")
    check_file(picture, "--picture")
    try:
        tokens = [int(n) for n in lengths.split(",")]
    except ValueError as error:
        raise UsageError(f"--lengths: expected numbers by commas, got {lengths!r}") from error
    with progress_bar("break-even") as progress:
        curves = break_even(
            names, target_named(target), shape=Shape(*site), lengths=tokens, record=record,
            progress=progress,
        )  # fmt: skip
    if picture is not None:
        draw(curves, picture)
    if json:
        print_json({"curves": [c.to_json() for c in curves]})
        return
    console.print(table(curves))
    for curve in curves:
        if curve.why:
            console.print(f"{curve.form}: {curve.why}", markup=False)


def form_rows() -> list[dict[str, Any]]:
    """One row of plain data per form: its own words, what it carries, its cost and fidelity."""
    from passes.form import forms
    from rewriter.form_facts import cost, fidelity

    rows = []
    for name, cls in forms().items():
        form = cls()
        paper = cls.paper
        rows.append(
            {
                "name": name,
                "family": cls.family,
                "exact": cls.exact,
                "trainable": cls.trainable,
                "needs": cls.needs,
                "cost": cost(form),
                "fidelity": fidelity(name),
                "carries": _carries(form),
                "formula": cls.formula,
                "about": inspect.getdoc(cls),
                "paper": f"{paper.authors} {paper.year}, {paper.title}",
                "link": paper.link,
                "options": {f.name: f.default for f in dataclasses.fields(cls.Config)},
            }
        )
    return rows


def _carries(form: Any) -> list[str]:
    from passes.decode_form import Streaming
    from passes.site import AttentionSite, Dims, Mask

    plain = Mask()
    trials = {
        "bidirectional": (plain, False, 4),
        "causal": (Mask(causal=True), False, 4),
        "padding": (Mask(padding=True), False, 4),
        "causal+padding": (Mask(causal=True, padding=True), False, 4),
        "window": (Mask(window=(8, 8)), False, 4),
        "bias": (Mask(bias=True), False, 4),
        "cross": (plain, True, 4),
        "GQA": (plain, False, 2),
    }
    carried = []
    for word, (mask, cross, groups) in trials.items():
        dims = Dims(1, 4, groups, 64, 96 if cross else 64, 32, 32)
        if form.applies(AttentionSite("trial#0", "trial", dims, "float32", 32**-0.5, mask, cross)):
            carried.append(word)
    dims, mask = Dims(1, 4, 4, 64, 64, 32, 32), Mask(causal=True)
    place = AttentionSite("trial#0", "trial", dims, "float32", 32**-0.5, mask)
    if isinstance(form, Streaming) and form.streams(place):
        carried.append("generation")
    return carried
