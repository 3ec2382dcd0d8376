"""Write the .rwa file: one ZIP archive with stored members, put in place atomically.

docs/artifact.md describes the format; codegen/archive.py reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray

from codegen.archive import (
    CODE,
    COMMENT,
    LOCAL,
    MANIFEST,
    MEMBERS,
    REPORT,
    WEIGHTS,
    Bytes,
    describe,
    frame_chunks,
    member_of,
    open_artifact,
    spans_of,
)
from codegen.manifest import Manifest
from codegen.weights_file import ALIGN, WeightsFile, without_copies
from passes.errors import ArtifactError

__all__ = ["describe", "open_artifact", "write_artifact"]

# zipfile wants 5 % of room below the 2 GiB at which it asks for 64-bit sizes.
_ZIP64_FROM = 2_000_000_000
_Chunks = Callable[[], Iterable[Bytes]]


def write_artifact(
    path: str | Path,
    manifest: Manifest,
    code: bytes,
    weights: Mapping[str, NDArray[Any]],
    report: Mapping[str, Any],
    *,
    called: str | None = None,
) -> Manifest:
    """Write the file beside `path`, then rename it there; returns the manifest as written.

    `path` either keeps what it held or holds the whole new file; two processes may write one path
    (the last rename wins). `ArtifactError` if it can not be written (no such folder, no
    permission, no space); the file beside is removed then, and on Ctrl-C. `weights` are
    name -> array of any shape; the names are those of `manifest.weights`. `called`: what messages
    call the path.
    """
    final = Path(os.path.realpath(path))
    if sorted(weights) != sorted(set(manifest.weights)):
        raise ArtifactError(f"{path}: the weights given are not those the manifest names")
    beside = final.with_name(f".{secrets.token_hex(8)}.rwa.part")
    try:
        if final.exists() and not final.is_file():
            raise ArtifactError(f"{path}: can not be written (it exists and is not a file)")
        written = _write(beside, manifest, code, weights, report)
        os.replace(beside, final)
        _sync_folder(final.parent)
    except OSError as error:
        name = called or path
        raise ArtifactError(f"{name}: can not be written ({error.strerror or error})") from error
    finally:
        # After the rename there is nothing left of this name.
        with contextlib.suppress(OSError):
            beside.unlink()
    return written


def _write(
    beside: Path,
    manifest: Manifest,
    code: bytes,
    weights: Mapping[str, NDArray[Any]],
    report: Mapping[str, Any],
) -> Manifest:
    stored, aliases = without_copies(weights)
    parts: dict[str, _Chunks] = {
        CODE: lambda: [code],
        WEIGHTS: WeightsFile(stored).chunks,
        REPORT: partial(_json_chunks, dict(report)),
    }
    members = {name: member_of(chunks()) for name, chunks in parts.items()}
    manifest = replace(manifest, aliases=aliases, members=members)
    text = _json_chunks(manifest.to_json())
    parts = {MANIFEST: lambda: text, **parts}
    sizes = {MANIFEST: len(text[0]), **{name: m.size for name, m in members.items()}}
    # "x": never through a link somebody else put there.
    with beside.open("x+b") as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.comment = COMMENT + b"0" * 64
            for name in MEMBERS:
                _put(archive, file, name, sizes[name], parts[name]())
        file.flush()
        _seal(beside, file)
        os.fsync(file.fileno())
    return manifest


def _put(
    archive: zipfile.ZipFile, file: IO[bytes], name: str, size: int, chunks: Iterable[Bytes]
) -> None:
    info = zipfile.ZipInfo(name)  # its date is 1980: the same content gives the same bytes
    info.external_attr, info.file_size = 0o644 << 16, size
    zip64 = size > _ZIP64_FROM
    info.extra = _padding(file.tell(), name, zip64)
    with archive.open(info, "w", force_zip64=zip64) as member:
        for chunk in chunks:
            member.write(chunk)


def _seal(path: Path, file: IO[bytes]) -> None:
    """Put the digest of the frame in place of the zeros at the end."""
    digest = hashlib.sha256()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole, memoryview(whole) as data:
        for chunk in frame_chunks(data, spans_of(path, file, data)):
            with chunk:
                digest.update(chunk)
    file.seek(-64, os.SEEK_END)
    file.write(digest.hexdigest().encode())
    file.flush()


def _padding(offset: int, name: str, zip64: bool) -> bytes:
    """A ZIP extra field after which the member written at `offset` begins at a multiple of 64."""
    fixed = offset + LOCAL.size + len(name.encode()) + (20 if zip64 else 0)
    # 0xD935 is the id Android's zipalign uses for padding; a field is at least 4 bytes long.
    length = (-fixed - 4) % ALIGN
    return struct.pack("<HH", 0xD935, length) + bytes(length)


def _json_chunks(data: Mapping[str, Any]) -> list[Bytes]:
    return [(json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()]


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
