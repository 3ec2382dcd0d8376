"""Read the .rwa file: every byte is checked before anything in it is used.

docs/artifact.md describes the format. Every byte of a file is covered by one hash: the members
code.so, weights.safetensors and report.json by their sha256 in the manifest, all the rest (the
manifest and the archive's own structure: the frame) by the sha256 in the archive's comment.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray

from codegen.manifest import Manifest, Member
from codegen.weights_file import read_weights
from passes.errors import ArtifactError, PathError

MANIFEST, CODE, WEIGHTS, REPORT = "manifest.json", "code.so", "weights.safetensors", "report.json"
MEMBERS = (MANIFEST, CODE, WEIGHTS, REPORT)
COMMENT = b"rwa sha256="
TRAILER = len(COMMENT) + 64
_END = struct.Struct("<4s4H2LH")
LOCAL = struct.Struct("<4s5H3L2H")
Bytes = bytes | memoryview
# What zipfile raises on a damaged index, beside its own error.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    struct.error,
    ValueError,
    RuntimeError,  # and so NotImplementedError
    OverflowError,
    IndexError,
    EOFError,
)


@dataclass(frozen=True)
class Opened:
    """A checked file: its manifest, and its members as views of the mapped file."""

    path: Path
    manifest: Manifest
    code: memoryview
    weights: memoryview
    report: dict[str, Any]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Name -> array over the mapping, aliases resolved, for every name of the manifest."""
        stored = read_weights(self.weights, str(self.path))
        aliases, wanted = self.manifest.aliases, self.manifest.weights
        missing = [n for n in wanted if aliases.get(n, n) not in stored]
        if missing:
            raise ArtifactError(f"{self.path}: weight {missing[0]!r} is not in the file")
        return {name: stored[aliases.get(name, name)] for name in wanted}


def describe(path: str | Path) -> Manifest:
    """The manifest of an artifact; loads no code. Everything but the big members is checked."""
    return _open(Path(path))[0]


def open_artifact(path: str | Path) -> Opened:
    """Check every byte of the file; `ArtifactError` names the part that is damaged."""
    path = Path(path)
    manifest, views = _open(path)
    for name, member in manifest.members.items():
        if hashlib.sha256(views[name]).hexdigest() != member.sha256:
            raise ArtifactError(f"{path}: {name} is damaged or was altered (its sha256 differs)")
    report = _json(path, REPORT, views[REPORT])
    if not isinstance(report, dict):
        raise ArtifactError(f"{path}: {REPORT} is not an object")
    return Opened(path, manifest, views[CODE], views[WEIGHTS], report)


def _open(path: Path) -> tuple[Manifest, dict[str, memoryview]]:
    """The manifest and views of all members; everything outside the big members is checked."""
    try:
        with path.open("rb") as file:
            return _frame(path, file)
    except FileNotFoundError as error:
        raise PathError(
            f"{path}: there is no such file; make one with `rewriter compile`"
        ) from error
    except OSError as error:
        raise ArtifactError(f"{path}: can not be read ({error.strerror})") from error


def _frame(path: Path, file: IO[bytes]) -> tuple[Manifest, dict[str, memoryview]]:
    info = os.fstat(file.fileno())
    if not stat.S_ISREG(info.st_mode):
        raise ArtifactError(f"{path}: not a file")
    if info.st_size < _END.size + TRAILER:
        raise ArtifactError(f"{path}: not an artifact ({info.st_size} bytes long)")
    # Copy-on-write, so that the arrays over it can be handed on as writable.
    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    digest = _trailer(path, data)
    spans = spans_of(path, file, data)
    views = {name: data[start:end] for name, (start, end) in spans.items()}
    if member_of(frame_chunks(data, spans)).sha256 != digest:
        raise ArtifactError(f"{path}: the file is damaged or was altered (its sha256 differs)")
    manifest = Manifest.from_json(_json(path, MANIFEST, views[MANIFEST]), str(path))
    sizes = {name: len(views[name]) for name in MEMBERS if name != MANIFEST}
    if sizes != {name: m.size for name, m in manifest.members.items()}:
        raise ArtifactError(f"{path}: its members are not those its manifest names")
    return manifest, views


def _trailer(path: Path, data: memoryview) -> str:
    """The digest in the comment; refuses other files and truncated ones before parsing them."""
    tail = bytes(data[-TRAILER:])
    end = _END.unpack(data[-TRAILER - _END.size : -TRAILER])
    found = re.fullmatch(re.escape(COMMENT) + rb"([0-9a-f]{64})", tail)
    if end[0] != b"PK\5\6" or end[-1] != TRAILER or found is None:
        begins = bytes(data[:4]) == b"PK\3\4"
        what = "cut short, damaged or not an artifact" if begins else "not an artifact"
        raise ArtifactError(f"{path}: {what}")
    if end[3] != len(MEMBERS) or end[4] != len(MEMBERS):
        raise ArtifactError(f"{path}: not an artifact (its members are others)")
    return found[1].decode()


def spans_of(path: Path, file: IO[bytes], data: memoryview) -> dict[str, tuple[int, int]]:
    """Where each member's bytes lie; only the fixed members, stored, inside the file, in order."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except _ZIP_ERRORS as error:
        raise ArtifactError(f"{path}: damaged ({error})") from error
    if tuple(info.filename for info in infos) != MEMBERS:
        raise ArtifactError(f"{path}: not an artifact (its members are others)")
    spans, before = {}, 0
    for info in infos:
        start = _payload(path, data, info)
        end = start + info.file_size
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not stored or not before <= start <= end <= len(data):
            raise ArtifactError(f"{path}: {info.filename} is damaged")
        spans[info.filename], before = (start, end), end
    return spans


def _payload(path: Path, data: memoryview, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, which the archive's index skips."""
    at = info.header_offset
    if not 0 <= at <= len(data) - LOCAL.size or bytes(data[at : at + 4]) != b"PK\3\4":
        raise ArtifactError(f"{path}: {info.filename} is damaged")
    *_, name_length, extra_length = LOCAL.unpack(data[at : at + LOCAL.size])
    return int(at + LOCAL.size + name_length + extra_length)


def frame_chunks(data: memoryview, spans: dict[str, tuple[int, int]]) -> Iterator[memoryview]:
    """Everything outside the members that the manifest's hashes cover, and outside the digest."""
    at = 0
    for name in MEMBERS:
        if name != MANIFEST:
            start, end = spans[name]
            yield data[at:start]
            at = end
    yield data[at:-64]


def _json(path: Path, name: str, data: memoryview) -> Any:
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: {name} is damaged ({error})") from error


def member_of(chunks: Iterable[Bytes]) -> Member:
    """Size and sha256 of these bytes."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
    return Member(size, digest.hexdigest())
