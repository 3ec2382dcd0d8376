"""Write the generated pages of docs/: ``python -m rewriter.docs`` (forms.md, cli.md)."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

DOCS = Path(__file__).parent.parent / "docs"


def forms_page() -> str:
    """docs/forms.md: one section per form, from the forms themselves."""
    from rewriter.cli.forms_verb import form_rows

    lines = [
        "# Forms of attention",
        "",
        "Written by `python -m rewriter.docs` from the forms' own files in `passes/forms/`. What a",
        "form carries is asked of its `applies`. `rewriter explain MODEL` says for each site of a",
        "model which forms can stand there and why the others can not.",
    ]
    for row in form_rows():
        kind = "exact" if row["exact"] else "approximate"
        options = ", ".join(f"`{k}` (default {v!r})" for k, v in row["options"].items()) or "none"
        lines += [
            "",
            f"## {row['name']}",
            "",
            f"- **Formula**: `{row['formula']}`",
            f"- **Kind**: {row['family']}, {kind}; needs {row['needs']}",
            f"- **Carries**: {', '.join(row['carries'])}",
            f"- **Options**: {options}",
            f"- **Source**: {row['paper']}" + (f" ({row['link']})" if row["link"] else ""),
        ]
    return "\n".join(lines) + "\n"


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


PAGES = {"forms.md": forms_page, "cli.md": cli_page}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        sys.stdout.write(f"wrote {DOCS / name}\n")


if __name__ == "__main__":
    main()
