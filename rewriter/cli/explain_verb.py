"""`rewriter explain`: what every form says of every site."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Any

import typer

from passes.errors import UnmatchedRule
from rewriter.cli import options as o
from rewriter.cli.output import console, print_json

Pattern = Annotated[str, typer.Option("--site", help="Only the sites this glob matches.")]


def verb(
    model: o.Model,
    site: Pattern = "*",
    tokens: o.Tokens = None,
    batch: o.Batch = 1,
    image: o.Image = None,
    attn: o.Attn = "sdpa",
    json: o.Json = False,
) -> None:
    """Say for every site which forms can stand there, and why the others can not.

    Example: rewriter explain t5-small-encoder --site "*layer.0*"
    """
    from rewriter.api import find_sites

    loaded = o.open_model(model, tokens, batch, image, attn)
    _, found = find_sites(loaded.model, loaded.example_inputs)
    sites = [s for s in found.sites if fnmatch.fnmatchcase(s.id, site)]
    if not sites and site != "*":
        ids = ", ".join(s.id for s in found.sites) or "none at all"
        raise UnmatchedRule(f"--site {site!r} matches no site; the sites are: {ids}")
    rows = [_explain(s) for s in sites]
    misses = [m.to_json() for m in found.near_misses]
    if json:
        print_json({"model": loaded.name, "sites": rows, "near_misses": misses})
        return
    _show(rows)
    for miss in found.near_misses:
        console.print(f"near miss: {miss.source}: {miss.reason}", markup=False)


def _explain(site: Any) -> dict[str, Any]:
    from passes.form import forms

    verdicts = {name: form().applies(site) for name, form in forms().items()}
    return {
        "id": site.id,
        "mask": site.mask.kind,
        "source": site.source,
        "verdicts": {
            name: {
                "ok": bool(verdict),
                "code": str(verdict.reason) if verdict.reason else None,
                "detail": verdict.detail,
            }
            for name, verdict in verdicts.items()
        },
    }


def _show(rows: list[dict[str, Any]]) -> None:
    """Sites that get the same verdicts are told together."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        taken, refused = _split(row)
        groups.setdefault((row["mask"], taken, refused), []).append(row)
    for (mask, taken, refused), members in groups.items():
        for row in members:
            console.print(f"{row['id']}  [{mask}]  {row['source']}", markup=False, soft_wrap=True)
        console.print(f"  can stand here: {taken or 'none'}", markup=False)
        if refused:
            console.print(refused, markup=False)
        console.print()


def _split(row: dict[str, Any]) -> tuple[str, str]:
    """(names of the forms that can stand here, lines with the reasons of the others)."""
    taken = [name for name, v in row["verdicts"].items() if v["ok"]]
    reasons: dict[str, list[str]] = {}
    for name, v in row["verdicts"].items():
        if not v["ok"]:
            detail = v["detail"].replace(row["id"], "the site").replace(name, "it")
            reasons.setdefault(f"{v['code']}: {detail}", []).append(name)
    lines = [f"  can not: {', '.join(names)} ({why})" for why, names in reasons.items()]
    return ", ".join(taken), "\n".join(lines)
