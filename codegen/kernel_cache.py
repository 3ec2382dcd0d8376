"""Compiled code kept on disk by content, so that a second compile of a model takes seconds.

An entry is one file named by its key: a line with the sha256 of the rest, a line of JSON, the
code. It is written beside and renamed, so two processes and a kill leave whole files only, and it
is checked against its hash and its key before use; one that is damaged is removed and made anew.
The folder is bounded: what was not used for longest goes first.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codegen.manifest import installed_versions
from codegen.target import Target, usable_cores
from passes.errors import UsageError

FORMAT = 2
MOST_BYTES = 1 << 30
SUFFIX = ".kernels"
# A file beside that is older was left by a process that was killed.
STALE_SECONDS = 3600.0
FOLDER = "REWRITER_CACHE_DIR"  # a folder, or "off"
SIZE = "REWRITER_CACHE_MB"


@dataclass(frozen=True)
class Entry:
    """Compiled code and what is known of it (plain data)."""

    code: bytes
    facts: Mapping[str, Any] = field(default_factory=dict)


def default_folder() -> Path | None:
    """$REWRITER_CACHE_DIR (None where it is "off"), else the user's cache folder."""
    said = os.environ.get(FOLDER, "")
    if said.lower() == "off":
        return None
    if said:
        return Path(said)
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "attention-rewriter" / "kernels"


def default_cache() -> KernelCache | None:
    """The cache of this user; None where it is off.

    Raises:
        UsageError: $REWRITER_CACHE_MB is not a whole number.
    """
    folder = default_folder()
    return None if folder is None else KernelCache(folder, _bound())


def _bound() -> int:
    said = os.environ.get(SIZE, "")
    if not said:
        return MOST_BYTES
    if not said.isdecimal():
        raise UsageError(f"{SIZE}: {said!r} given, a whole number of megabytes expected")
    return int(said) * 1_000_000


def key_of(mod: Any, target: Target, **settings: Any) -> str:
    """A key (hex) of everything compiled code depends on.

    `mod` is the Relax module with its weights lifted out; its text with the constants it still
    holds is the same in every process. To that come the target, the cores work is cut for, the
    versions of TVM, the sources of this package (kernels and rules) and `settings`.
    """
    said = {
        "format": FORMAT,
        "text": hashlib.sha256(mod.script(show_meta=True).encode()).hexdigest(),
        "target": target.to_json(),
        "cores": usable_cores(),
        "versions": installed_versions(),
        "sources": sources(),
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@functools.cache
def sources() -> str:
    """sha256 over all Python files of codegen/ by path."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class KernelCache:
    """Entries in `folder`, at most `most` bytes. Never raises for what the disk does."""

    def __init__(self, folder: Path, most: int = MOST_BYTES) -> None:
        self.folder, self.most = folder, most

    def path(self, key: str) -> Path:
        """Where the entry of `key` is."""
        return self.folder / f"{key}{SUFFIX}"

    def get(self, key: str) -> Entry | None:
        """The entry, whole and checked; None if there is none or it is damaged."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        entry = _read(data, key)
        with contextlib.suppress(OSError):
            if entry is None:
                path.unlink()
            else:
                os.utime(path)  # used now: the last to go
        return entry

    def put(self, key: str, entry: Entry) -> bool:
        """Keep the entry; False where it can not be written."""
        head = json.dumps({"key": key, "facts": dict(entry.facts)}).encode()
        rest = head + b"\n" + entry.code
        beside = self.folder / f".{secrets.token_hex(8)}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with beside.open("xb") as file:
                file.write(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path(key))
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()
        self._shrink(key)
        return True

    def facts(self) -> dict[str, Any]:
        """{"folder", "entries", "bytes", "most_bytes"}."""
        sizes = [stat.st_size for _, stat in self._entries()]
        return {
            "folder": str(self.folder),
            "entries": len(sizes),
            "bytes": sum(sizes),
            "most_bytes": self.most,
        }

    def _shrink(self, keep: str) -> None:
        """Remove the longest unused until all fit (never `keep`), and what kills left behind."""
        found = sorted(self._entries(), key=lambda item: item[1].st_mtime)
        total = sum(stat.st_size for _, stat in found)
        for path, stat in found:
            if total <= self.most:
                break
            if path != self.path(keep):
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= stat.st_size
        for path in self.folder.glob(".*.part"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                yield path, path.stat()


def _read(data: bytes, key: str) -> Entry | None:
    digest, _, rest = data.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        return None
    head, _, code = rest.partition(b"\n")
    try:
        said = json.loads(head)
        return Entry(code, said["facts"]) if said["key"] == key else None
    except (ValueError, KeyError, TypeError):
        return None
