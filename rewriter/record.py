"""A record of rows on disk that a killed measurement goes on from: read, checked, written whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from passes.errors import ArtifactError, UsageError
from rewriter.outputs import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


def read_rows(
    path: Path | None,
    head: Mapping[str, Any],
    rows: str,
    of: Callable[[Mapping[str, Any]], T],
    verb: str,
    other: str = "other settings",
) -> list[T]:
    """The rows kept in `path`, [] if there is no such file.

    Args:
        head: what the file must say beside its rows (schema and settings).
        rows: the key of the rows; of: makes one from plain data.
        verb: the command that writes such files; other: what a record that does not fit was made
            with; both for the messages.

    Raises:
        UsageError: another file, or a record of other settings.
    """
    if path is None or not path.exists():
        return []
    try:
        data = json.loads(path.read_text())
        found = [of(row) for row in data[rows]]
        same = all(data[key] == json.loads(json.dumps(value)) for key, value in head.items())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"record {path}: not a record of `rewriter {verb}`") from error
    if not same:
        raise UsageError(f"record {path}: was made with {other}; name another file")
    return found


def write_rows(path: Path | None, head: Mapping[str, Any], rows: str, data: Sequence[Any]) -> None:
    """Write the rows beside, one a line, then rename; nothing without a path."""
    if path is None:
        return
    told = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines = ",\n".join(json.dumps(row) for row in data)
    write_text(
        path, "{\n" + "".join(f"{line},\n" for line in told) + f'"{rows}": [\n{lines}\n]}}\n'
    )


def read_record(path: Path, rows: str, of: Callable[[Mapping[str, Any]], T]) -> tuple[Any, list[T]]:
    """(all of a record that was written by `write_rows`, its rows); for pages made from it."""
    data = json.loads(path.read_text())
    return data, [of(row) for row in data[rows]]


def save_picture(figure: Figure, path: Path) -> None:
    """A PNG (or what the suffix says); `ArtifactError` where it can not be written."""
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"--picture {path}: can not be written ({error})") from error
