"""Places to write to: checked before the work, written beside and renamed after it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from passes.errors import ArtifactError, PathError


def check_file(path: Path | str | None, option: str = "output") -> None:
    """`PathError` if no file can be written at `path`; None is no output and fine.

    Call it before minutes of work. `option` is what the message calls the argument.
    """
    if path is None:
        return
    path = Path(path)
    if path.is_dir():
        raise PathError(f"{option} {path}: is a folder; name a file")
    if path.exists() and not path.is_file():
        raise PathError(f"{option} {path}: exists and is not a file; name another")
    _check_parent(path, option)


def check_folder(folder: Path | str | None, own: Iterable[str], option: str = "output") -> None:
    """`PathError` if no folder can be made at `folder`, or what is there is not ours.

    A folder that is there may hold only files called as in `own`: it would be replaced.
    """
    if folder is None:
        return
    folder = Path(folder)
    if folder.exists():
        known = set(own)
        if not folder.is_dir() or any(p.name not in known for p in folder.iterdir()):
            raise PathError(f"{option} {folder}: exists and is not a rewritten model; name another")
    _check_parent(folder, option)


def make_folder(folder: Path | str, option: str = "output") -> None:
    """Make `folder` and its parents if they are not there; `PathError` where that fails."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PathError(
            f"{option} {folder}: no folder can be made there ({error.strerror}); name another"
        ) from error
    _check_parent(folder / "any", option)


def _check_parent(path: Path, option: str) -> None:
    parent = path.absolute().parent
    if not parent.is_dir():
        raise PathError(f"{option} {path}: the folder {parent} does not exist; create it first")
    # Permissions alone say little (root, read-only mounts, /proc): try it.
    probe = parent / f".{secrets.token_hex(6)}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PathError(
            f"{option} {path}: nothing can be written in {parent} ({error.strerror}); name another"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` beside `path`, then rename; `ArtifactError` if that can not be done."""
    beside = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise ArtifactError(f"output {path}: can not be written ({error.strerror})") from error
    finally:
        # After the rename there is nothing left of this name.
        with contextlib.suppress(OSError):
            beside.unlink()
