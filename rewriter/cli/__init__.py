"""The command line: one file per verb, all thin over rewriter.api.

Exit codes: 0 ok, 1 the work failed, 2 wrong use, 130 interrupted. A user's mistake prints one
line; ``--debug`` (anywhere on the line) shows the traceback.
"""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    from rewriter.cli.app import build_app, guarded

    debug = "--debug" in argv
    return guarded(build_app(), [a for a in argv if a != "--debug"], debug)
