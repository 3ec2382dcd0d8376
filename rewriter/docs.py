"""Write the generated pages of docs/ and their pictures: ``python -m rewriter.docs``."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rewriter.measured_pages import draw_pictures, measured_pages

DOCS = Path(__file__).parent.parent / "docs"


def forms_page() -> str:
    """docs/forms.md: a table of all forms, then one section per form, from the forms themselves."""
    from rewriter.cli.forms_verb import form_rows

    rows = form_rows()
    return "\n".join([*_FORMS_HEAD, *_forms_table(rows), *_forms_sections(rows)]) + "\n"


_FORMS_HEAD = (
    "# Forms of attention",
    "",
    "Written by `python -m rewriter.docs` from the forms' own files in `passes/forms/`. What a",
    "form carries is asked of its `applies`. `rewriter explain MODEL` says for each site of a",
    "model which forms can stand there and why the others can not.",
    "",
    "**Cost** is the form's own count of operations (`Form.ops`, which a test compares with the",
    "kernels), all kinds alike, of one head of width 64 without a mask: at 1024 tokens, in parts",
    "of exact attention's, and what twice the tokens multiply it by. Pairs that a window or",
    "causality hides are counted, though kernels skip most of them. Operations are not time:",
    "`rewriter forms --break-even` measures time on this machine.",
    "",
    "**Output error** is the relative error of the attention's output for the model's own queries,",
    "keys and values; **cosine** compares the sentence embeddings of the whole model with the form",
    "at every site. At 128 tokens `lolcats` is still softmax: its window holds them all.",
    "",
)


def _forms_table(rows: list[dict[str, Any]]) -> list[str]:
    from rewriter.form_facts import AFTER, BEFORE, cells, record

    lines = [f"- Without a fit: {record(BEFORE)['settings']}."]
    if record(AFTER)["forms"]:
        lines.append(f"- After a fit: {record(AFTER)['settings']}.")
    lines += [
        "",
        "| form | needs | operations, of exact | twice the tokens | output error | cosine "
        "| cosine after fit |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        found = row["cost"]
        cost = [f"{found['of_exact']:.2f}", f"{found['growth']:.2f}"] if found else ["", ""]
        line = [f"[{row['name']}](#{row['name']})", row["needs"], *cost, *cells(row["fidelity"])]
        lines.append(f"| {' | '.join(line)} |")
    return lines


def _forms_sections(rows: list[dict[str, Any]]) -> list[str]:
    from rewriter.form_facts import told_cost, told_fidelity

    lines = []
    for row in rows:
        kind = "exact" if row["exact"] else "approximate"
        options = ", ".join(f"`{k}` (default {v!r})" for k, v in row["options"].items()) or "none"
        lines += [
            "",
            f"## {row['name']}",
            "",
            row["about"],
            "",
            f"- **Formula**: `{row['formula']}`",
            f"- **Kind**: {row['family']}, {kind}; needs {row['needs']}",
            f"- **Cost**: {told_cost(row['cost'])}",
            f"- **Fidelity**: {told_fidelity(row['fidelity'])}",
            f"- **Carries**: {', '.join(row['carries'])}",
            f"- **Options**: {options}",
            f"- **Source**: {row['paper']}" + (f" ({row['link']})" if row["link"] else ""),
        ]
    return lines


def cli_page() -> str:
    """docs/cli.md: every verb with its text, options and example."""
    import importlib

    from rewriter.cli.app import EPILOG, VERBS

    lines = [
        "# Command line",
        "",
        "Written by `python -m rewriter.docs`. Exit codes: 0 ok, 1 the work failed, 2 wrong use,",
        "130 interrupted.",
        "",
        EPILOG,
    ]
    for name in VERBS:
        verb = importlib.import_module(f"rewriter.cli.{name}_verb").verb
        lines += ["", f"## rewriter {name}", "", *_text(verb), "", *_options(verb)]
    return "\n".join(lines).rstrip() + "\n"


def _text(verb: Any) -> list[str]:
    text = " ".join(inspect.cleandoc(verb.__doc__).split())
    head, _, example = text.partition("Example: ")
    return [head.strip(), "", "```", example.strip(), "```"]


def _options(verb: Any) -> list[str]:
    hints = get_type_hints(verb, include_extras=True)
    rows = ["| argument | default | meaning |", "|---|---|---|"]
    for name, parameter in inspect.signature(verb).parameters.items():
        info = get_args(hints[name])[1]
        # In an annotation typer keeps the first name of an option where a default would be.
        named = (getattr(info, "default", None), *(getattr(info, "param_decls", None) or ()))
        flags = [n for n in named if isinstance(n, str) and n.startswith("-")]
        argument = type(info).__name__ == "ArgumentInfo"
        shown = info.metavar or name if argument else ", ".join(flags or [_flag(name)])
        default = parameter.default
        empty = default is inspect.Parameter.empty
        told = "required" if empty else "" if default in (None, False) else f"`{default}`"
        rows.append(f"| `{shown}` | {told} | {info.help or ''} |".replace("|MODEL", "\\|MODEL"))
    return rows


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


PAGES = {"forms.md": forms_page, "cli.md": cli_page, **measured_pages()}


def main(argv: list[str] | None = None) -> None:
    """Write every page, and the pictures of those made from records."""
    about = f"Write {', '.join(PAGES)} and their pictures anew in {DOCS}."
    argparse.ArgumentParser(prog="python -m rewriter.docs", description=about).parse_args(argv)
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        sys.stdout.write(f"wrote {DOCS / name}\n")
    draw_pictures(DOCS)


if __name__ == "__main__":
    main()
