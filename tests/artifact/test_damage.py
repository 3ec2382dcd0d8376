"""Damaged, altered, foreign and strange files: refused with ArtifactError before code is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from codegen import runtime
from codegen.archive import CODE, MANIFEST, MEMBERS, REPORT, TRAILER, WEIGHTS
from codegen.container import describe, open_artifact
from codegen.host import Host, this_host
from codegen.manifest import Manifest
from codegen.runtime import load
from codegen.specs import TensorSpec
from passes.errors import ArtifactError
from tests.artifact.conftest import Small, host_target, manifest_for


class CodeWasLoaded(AssertionError):
    """Not an error a user can get: a check came too late."""


@pytest.fixture(autouse=True)
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: bytes) -> None:
        raise CodeWasLoaded

    monkeypatch.setattr(runtime, "load_library", refuse)


def test_the_guard_sees_a_whole_file_load(small_file: Path) -> None:
    """The control: the same guard does fire for a file that is in order."""
    with pytest.raises(CodeWasLoaded):
        load(small_file)


def where_members_lie(path: Path) -> dict[str, tuple[int, int]]:
    """Found without the code under test: each member's bytes searched in the file."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    return {n: (data.index(c), data.index(c) + len(c)) for n, c in contents.items()}


def positions(path: Path, count: int) -> list[tuple[str, int]]:
    """Random places in every member and in every stretch between two of them."""
    rng, found, at = random.Random(), [], 0
    spans = [(name, *span) for name, span in where_members_lie(path).items()]
    for name, start, end in [*spans, ("end", os.path.getsize(path), 0)]:
        found += [(f"before {name}", rng.randrange(at, start)) for _ in range(count)]
        if end > start:
            found += [(name, rng.randrange(start, end)) for _ in range(count)]
        at = end
    return found


def test_any_flipped_bit_is_refused(small_file: Path, tmp_path: Path) -> None:
    data, damaged = small_file.read_bytes(), tmp_path / "damaged.rwa"
    named: dict[str, set[str]] = {}
    tried = positions(small_file, 25)
    assert {name for name, _ in tried} >= {*MEMBERS, "before end"}
    for name, at in tried:
        for bit in {0, random.randrange(8), 7}:
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            damaged.write_bytes(changed)
            with pytest.raises(ArtifactError, match=str(damaged)) as caught:
                load(damaged)
            named.setdefault(name, set()).add(str(caught.value))
    for name in (CODE, WEIGHTS, REPORT):
        assert all(f"{name} is damaged" in message for message in named[name])


def test_every_byte_of_the_frame_counts(small_file: Path, tmp_path: Path) -> None:
    """The first and the last bytes one by one: local header, index, comment, digest."""
    data, damaged = small_file.read_bytes(), tmp_path / "damaged.rwa"
    end = len(data)
    for at in [*range(0, 70), *range(end - TRAILER - 22 - 250, end)]:
        changed = bytearray(data)
        changed[at] ^= 1 << random.randrange(8)
        damaged.write_bytes(changed)
        with pytest.raises(ArtifactError):
            describe(damaged)


def test_any_truncation_is_refused(small_file: Path, tmp_path: Path) -> None:
    data, damaged = small_file.read_bytes(), tmp_path / "short.rwa"
    sizes = {0, 1, 21, 22, 96, 97, len(data) - 1, len(data) - 64, len(data) - 65, len(data) // 2}
    sizes |= {random.randrange(len(data)) for _ in range(60)}
    sizes |= {edge for span in where_members_lie(small_file).values() for edge in span}
    for size in sizes:
        damaged.write_bytes(data[:size])
        with pytest.raises(ArtifactError, match=r"artifact|damaged|cut short"):
            load(damaged)


def test_bytes_added_removed_or_moved(small_file: Path, tmp_path: Path) -> None:
    data, path = small_file.read_bytes(), tmp_path / "x.rwa"
    middle = len(data) // 2
    for changed in (
        data + b"\0",
        b"\0" + data,
        data[:middle] + b"\0" + data[middle:],
        data[:middle] + data[middle + 1 :],
        data + data,
        data[1:],
    ):
        path.write_bytes(changed)
        with pytest.raises(ArtifactError):
            load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"hello, this is text\n" * 50, b"\x7fELF" + bytes(5000), b"{}" * 200, bytes(9999)],
    ids=["empty", "two-bytes", "text", "elf", "json", "zeros"],
)
def test_other_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.rwa"
    path.write_bytes(content)
    for opener in (load, describe):
        with pytest.raises(ArtifactError, match="not an artifact"):
            opener(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        load(tmp_path / "missing.rwa")
    with pytest.raises(ArtifactError, match="directory"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match="not a file"):
        load("/dev/null")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(ArtifactError, match="can not be read"):
            load(tmp_path / "socket")


def rebuilt(small_file: Path, path: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """The archive packed anew by plain zipfile, with the old comment, after `change`."""
    with zipfile.ZipFile(small_file) as archive:
        contents, comment = {n: archive.read(n) for n in archive.namelist()}, archive.comment
    change(contents)
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = comment
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def swap_manifest(contents: dict[str, bytes]) -> None:
    manifest = json.loads(contents[MANIFEST])
    manifest["members"] = {}
    contents[MANIFEST] = json.dumps(manifest).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: None,
        lambda c: c.update({"../../etc/passwd": b"root"}),
        lambda c: c.pop(REPORT),
        lambda c: c.update({CODE: b"\x7fELF" + bytes(100)}),
        lambda c: c.update({f"{i}.txt": b"" for i in range(2000)}),
        swap_manifest,
    ],
    ids=["repacked", "path-outside", "member-missing", "other-code", "many-members", "manifest"],
)
def test_archives_packed_by_somebody_else(
    small_file: Path, tmp_path: Path, change: Callable[[dict[str, bytes]], object]
) -> None:
    with pytest.raises(ArtifactError):
        load(rebuilt(small_file, tmp_path / "x.rwa", change))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.rwa"]


def test_a_compressed_bomb_is_not_unpacked(small_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "bomb.rwa"
    with zipfile.ZipFile(small_file) as archive:
        comment = archive.comment
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = comment
        for name in MEMBERS:
            archive.writestr(name, bytes(50_000_000))
    with pytest.raises(ArtifactError, match="damaged"):
        load(path)


def foreign(small: Small, path: Path, **changes: object) -> Path:
    model = dataclasses.replace(small, manifest=manifest_for(host_target(**changes)))
    return model.write(path)


def test_another_architecture(small: Small, tmp_path: Path) -> None:
    other = "aarch64" if this_host().arch == "x86_64" else "x86_64"
    path = foreign(small, tmp_path / "a.rwa", name="edge:other", triple=f"{other}-linux-gnu")
    with pytest.raises(ArtifactError, match=f"made for edge:other; it holds {other} code"):
        load(path)
    assert describe(path).target["triple"] == f"{other}-linux-gnu"


def test_another_system(small: Small, tmp_path: Path) -> None:
    path = foreign(small, tmp_path / "a.rwa", triple=f"{this_host().arch}-apple-darwin23")
    with pytest.raises(ArtifactError, match="code for darwin and this machine runs linux"):
        load(path)


def test_features_this_machine_lacks(small: Small, tmp_path: Path) -> None:
    some = sorted(this_host().features)[:2]
    path = foreign(small, tmp_path / "a.rwa", features=(*some, "amx_of_tomorrow", "avx99"))
    with pytest.raises(ArtifactError, match=r"lacks: amx_of_tomorrow, avx99$"):
        load(path)


def test_features_are_asked_of_the_host(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = foreign(small, tmp_path / "a.rwa", features=("avx99",))
    host = dataclasses.replace(this_host(), features=frozenset({"avx99"}))
    monkeypatch.setattr(runtime, "this_host", lambda: host)
    with pytest.raises(CodeWasLoaded):
        load(path)
    monkeypatch.setattr(runtime, "this_host", lambda: Host(host.arch, host.os))
    with pytest.raises(ArtifactError, match="avx99"):
        load(path)


def test_cuda_code_without_a_gpu(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = foreign(
        small, tmp_path / "a.rwa", name="cuda:sm_90", kind="gpu", tvm={"arch": "sm_90"}, features=()
    )
    host = dataclasses.replace(this_host(), cuda=())
    monkeypatch.setattr(runtime, "this_host", lambda: host)
    with pytest.raises(ArtifactError, match="needs a CUDA GPU and this machine has none"):
        load(path)
    host = dataclasses.replace(host, cuda=((8, 0),))
    with pytest.raises(ArtifactError, match="sm_90 and this machine has sm_80"):
        load(path)


@pytest.mark.parametrize("name", ["apache-tvm", "apache-tvm-ffi"])
def test_another_version_of_tvm(small: Small, tmp_path: Path, name: str) -> None:
    versions = {**small.manifest.versions, name: "0.99.0"}
    manifest = dataclasses.replace(small.manifest, versions=versions)
    path = dataclasses.replace(small, manifest=manifest).write(tmp_path / "a.rwa")
    with pytest.raises(ArtifactError, match=rf"compiled with {name} 0\.99\.0"):
        load(path)


@pytest.mark.parametrize(("dtype", "shape"), [("bfloat99", (2,)), ("O", (2,)), ("float32", (-1,))])
def test_tensors_of_no_known_kind(
    small: Small, tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    outputs = (TensorSpec("y", shape, dtype),)
    manifest = dataclasses.replace(small.manifest, outputs=outputs)
    path = dataclasses.replace(small, manifest=manifest).write(tmp_path / "a.rwa")
    with pytest.raises(ArtifactError, match="tensor 'y'"):
        load(path)


@pytest.mark.parametrize("key", ["inputs", "weights", "members", "target", "peak_memory"])
def test_manifests_that_lack_something(small: Small, key: str) -> None:
    data = small.manifest.to_json()
    del data[key]
    with pytest.raises(ArtifactError, match=f"where: its manifest is damaged.*{key}"):
        Manifest.from_json(data, "where")
    with pytest.raises(ArtifactError, match="where: its manifest"):
        Manifest.from_json({**data, key: "5x" if key == "peak_memory" else 5}, "where")


def test_a_later_format(small: Small, tmp_path: Path) -> None:
    manifest = dataclasses.replace(small.manifest, schema=99)
    path = dataclasses.replace(small, manifest=manifest).write(tmp_path / "a.rwa")
    with pytest.raises(ArtifactError, match="made with format 99"):
        load(path)


def test_whole_file_opens(small: Small, small_file: Path) -> None:
    opened = open_artifact(small_file)
    assert bytes(opened.code) == small.code
    assert opened.report == {"made": "for a test"}
