"""Writing an artifact: the layout, and that a failed or interrupted write leaves nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from codegen import container
from codegen.archive import CODE, MANIFEST, MEMBERS, REPORT, WEIGHTS
from codegen.container import describe, open_artifact, write_artifact
from codegen.manifest import Manifest, make_manifest
from codegen.specs import TensorSpec
from passes.errors import ArtifactError
from tests.artifact.conftest import host_target

ROOT = Path(__file__).parents[2]
ONE = (TensorSpec("x", (2,), "float32"),)
DTYPES = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64"


def manifest_of(weights: dict[str, np.ndarray]) -> Manifest:
    return make_manifest("m", host_target(), ONE, ONE, list(weights))


def write(path: Path, weights: dict[str, np.ndarray], code: bytes = b"code") -> Manifest:
    return write_artifact(path, manifest_of(weights), code, weights, {"a": 1, "b": [2.5, None]})


def some_weights() -> dict[str, np.ndarray]:
    """All dtypes, a scalar, an empty one, odd sizes, strided and big-endian ones."""
    rng = np.random.default_rng()
    found = {f"w.{d}": (rng.standard_normal((3, 7)) * 50).astype(d) for d in DTYPES.split()}
    wide = rng.standard_normal((64, 48)).astype(np.float32)
    found |= {"scalar": np.float32(rng.standard_normal()), "empty": np.zeros((0, 4), np.int32)}
    found |= {"wide": wide, "transposed": wide.T, "strided": wide[::3, ::5], '名前 "': wide[:1]}
    found["big endian"] = rng.standard_normal(9).astype(">f8")
    return {name: np.asarray(array) for name, array in found.items()}


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    weights = some_weights()
    write(tmp_path / "a.rwa", weights)
    arrays = open_artifact(tmp_path / "a.rwa").arrays()
    assert list(arrays) == list(weights)
    for name, array in weights.items():
        native = array.astype(array.dtype.newbyteorder("="))
        assert arrays[name].dtype == native.dtype
        assert arrays[name].shape == array.shape
        assert arrays[name].tobytes() == native.tobytes()


def test_other_tools_can_read_the_file(tmp_path: Path) -> None:
    weights = some_weights()
    written = write(tmp_path / "a.rwa", weights)
    with zipfile.ZipFile(tmp_path / "a.rwa") as archive:
        assert archive.testzip() is None
        assert tuple(archive.namelist()) == MEMBERS
        assert Manifest.from_json(json.loads(archive.read(MANIFEST)), "a") == written
        assert archive.read(CODE) == b"code"
        assert json.loads(archive.read(REPORT)) == {"a": 1, "b": [2.5, None]}
        tensors = safetensors.numpy.load(archive.read(WEIGHTS))
    for name, array in weights.items():
        assert (
            tensors[written.aliases.get(name, name)].tobytes()
            == np.asarray(array, array.dtype.newbyteorder("<")).tobytes()
        )


def test_large_weights_are_aligned_for_mapping(tmp_path: Path) -> None:
    weights = {f"w{i}": np.full(n, i, np.float32) for i, n in enumerate((3, 16, 1, 64, 7, 4096))}
    write(tmp_path / "a.rwa", weights)
    for name, array in open_artifact(tmp_path / "a.rwa").arrays().items():
        aligned = array.ctypes.data % 64 == 0
        assert aligned or weights[name].nbytes % 64 != 0


def test_members_with_64_bit_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of members beyond 2 GB, without writing that much."""
    monkeypatch.setattr(container, "_ZIP64_FROM", -1)
    weights = {"w": np.arange(64, dtype=np.float32)}
    write(tmp_path / "a.rwa", weights)
    (array,) = open_artifact(tmp_path / "a.rwa").arrays().values()
    np.testing.assert_array_equal(array, weights["w"])
    assert array.ctypes.data % 64 == 0
    with zipfile.ZipFile(tmp_path / "a.rwa") as archive:
        assert archive.testzip() is None


def test_equal_weights_are_stored_once(tmp_path: Path) -> None:
    big = np.random.default_rng().standard_normal((300, 100))
    near = big.copy()
    near[-1, -1] = np.nextafter(near[-1, -1], np.inf)
    weights = {"tied": big, "near": near, "same": big.copy(), "flat": big.reshape(-1)}
    written = write(tmp_path / "a.rwa", weights)
    assert written.aliases == {"same": "tied"}
    assert 3 * big.nbytes < os.path.getsize(tmp_path / "a.rwa") < 3 * big.nbytes + 4096
    for name, array in open_artifact(tmp_path / "a.rwa").arrays().items():
        np.testing.assert_array_equal(array, weights[name])


def test_equal_zeros_of_other_sign_are_two_weights(tmp_path: Path) -> None:
    weights = {"plus": np.zeros(4, np.float32), "minus": -np.zeros(4, np.float32)}
    assert write(tmp_path / "a.rwa", weights).aliases == {}
    assert np.signbit(open_artifact(tmp_path / "a.rwa").arrays()["minus"]).all()


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    weights = some_weights()
    manifest = manifest_of(weights)
    for name in "ab":
        write_artifact(tmp_path / name, manifest, b"code", weights, {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_manifest_survives(tmp_path: Path) -> None:
    inputs = (TensorSpec("ids", (1, 9), "int64", 0, 99), TensorSpec("mask", (1, 9), "bool"))
    target = host_target(features=("avx2",), threads=3, options={"a": [1, 2]})
    manifest = make_manifest(
        "model",
        target,
        inputs,
        ONE,
        [],
        plan={"sites": {"s": 1}},
        precision="bfloat16",
        peak_memory=12345,
    )
    written = write_artifact(tmp_path / "a.rwa", manifest, b"c", {}, {})
    read = describe(tmp_path / "a.rwa")
    assert read.to_json() == written.to_json()
    assert (read.inputs, read.outputs, read.features) == (inputs, ONE, ("avx2",))
    assert (read.peak_memory, read.precision, read.target["threads"]) == (12345, "bfloat16", 3)
    assert read.versions["apache-tvm"].startswith("0.27")
    assert set(read.members) == {CODE, WEIGHTS, REPORT}


def test_weights_must_be_those_of_the_manifest(tmp_path: Path) -> None:
    manifest = manifest_of({"a": np.zeros(1)})
    for weights in ({}, {"b": np.zeros(1)}, {"a": np.zeros(1), "b": np.zeros(1)}):
        with pytest.raises(ArtifactError, match="not those the manifest names"):
            write_artifact(tmp_path / "a.rwa", manifest, b"", weights, {})
    with pytest.raises(ArtifactError, match="weight 'a': dtype object"):
        write(tmp_path / "a.rwa", {"a": np.array([None])})
    assert list(tmp_path.iterdir()) == []


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write(tmp_path / "a.rwa", {})
    finally:
        os.umask(old)
    assert (tmp_path / "a.rwa").stat().st_mode & 0o777 == 0o640


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link.rwa").symlink_to(tmp_path / "real.rwa")
    write(tmp_path / "link.rwa", {})
    assert (tmp_path / "link.rwa").is_symlink()
    assert describe(tmp_path / "real.rwa").name == "m"


def test_places_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path, why in {
        tmp_path / "none" / "a.rwa": "No such file",
        tmp_path / "file" / "a.rwa": "Not a directory",
        tmp_path / "folder": "not a file",
        Path("/dev/null"): "not a file",
        Path("/proc/a.rwa"): "can not be written",
        tmp_path / ("n" * 300): "too long",
    }.items():
        with pytest.raises(ArtifactError, match=why) as caught:
            write(path, {})
        assert str(path) in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert Path("/dev/null").is_char_device()


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own at `folder`, where this user may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can not be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_read_only_disk(tmp_path: Path) -> None:
    refused = pytest.raises(ArtifactError, match=r"a\.rwa: can not be written \(Read-only")
    with small_disk(tmp_path, "size=512k,ro"), refused:
        write(tmp_path / "a.rwa", {})


@pytest.mark.skipif(os.getuid() == 0, reason="no permission stops root")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ArtifactError, match=r"a\.rwa: can not be written \(Permission"):
            write(tmp_path / "a.rwa", {})
    finally:
        tmp_path.chmod(0o755)


def in_process(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("limit", [10, 3_000, 400_000, 800_000])
def test_no_space(tmp_path: Path, limit: int) -> None:
    """The system refuses bytes beyond `limit` (as on a full disk): before, in, after members."""
    path = tmp_path / "a.rwa"
    weights = {"w": np.arange(200_000, dtype=np.float32)}
    write(path, {}, b"old")
    before = path.read_bytes()
    code = (
        "import resource, sys, signal\n"
        "from tests.artifact.test_write import *\n"
        "limit = int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try: write(Path(sys.argv[1]), {'w': np.arange(200_000, dtype=np.float32)})\n"
        "except ArtifactError as error: print(error)\n"
        "else: raise SystemExit('was written')\n"
    )
    assert weights["w"].nbytes >= limit
    done = in_process(code, path, limit)
    assert done.returncode == 0, done.stderr
    assert "a.rwa: can not be written (File too large)" in done.stdout
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.rwa"]


def test_disk_full(tmp_path: Path) -> None:
    with small_disk(tmp_path, "size=512k"):
        with pytest.raises(ArtifactError, match=r"a\.rwa: can not be written \(No space left"):
            write(tmp_path / "a.rwa", {"w": np.ones(1_000_000, np.float32)})
        assert list(tmp_path.iterdir()) == []
        write(tmp_path / "a.rwa", {"w": np.ones(10_000, np.float32)})
        open_artifact(tmp_path / "a.rwa")


@pytest.mark.parametrize("moment", ["_put", "_seal", "_sync_folder", "os.fsync", "os.replace"])
def test_ctrl_c_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    path = tmp_path / "a.rwa"
    write(path, {}, b"old")
    before = path.read_bytes()

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    owner, _, name = moment.rpartition(".")
    monkeypatch.setattr(os if owner else container, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, some_weights(), b"new")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a.rwa"]
    opened = open_artifact(path)
    if moment == "_sync_folder":
        assert bytes(opened.code) == b"new"
    else:
        assert path.read_bytes() == before


def write_often(path: Path, value: int, times: int) -> None:
    for _ in range(times):
        weights = {"w": np.full(50_000, value, np.float32)}
        write(path, weights, f"code of {value}".encode())


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    """While both write, every look at the file finds one whole version; nothing else is left."""
    path = tmp_path / "a.rwa"
    write_often(path, 0, 1)
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=write_often, args=(path, v, 40)) for v in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        opened = open_artifact(path)
        (value,) = set(opened.arrays()["w"].tolist())
        assert bytes(opened.code) == f"code of {int(value)}".encode()
        seen.add(value)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen & {1.0, 2.0}
    assert [p.name for p in tmp_path.iterdir()] == ["a.rwa"]


def test_threads_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.rwa"
    writers = [threading.Thread(target=write_often, args=(path, v, 5)) for v in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    (value,) = set(open_artifact(path).arrays()["w"].tolist())
    assert value in range(4)
    assert [p.name for p in tmp_path.iterdir()] == ["a.rwa"]


def test_missing_weight_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.rwa", {"w": np.zeros(3)})
    opened = open_artifact(tmp_path / "a.rwa")
    manifest = dataclasses.replace(opened.manifest, weights=("w", "v"))
    with pytest.raises(ArtifactError, match="weight 'v' is not in the file"):
        dataclasses.replace(opened, manifest=manifest).arrays()
