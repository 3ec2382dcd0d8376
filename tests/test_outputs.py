"""Writing where there is no room: one message that names the output, nothing half written."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from passes.errors import ArtifactError, FitError, PathError
from rewriter.api import Result, rewrite
from rewriter.fit_state import FitState, StateFolder
from rewriter.folder import FILES, save_rewritten
from rewriter.outputs import check_file, check_folder, make_folder, write_text


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def result() -> Result:
    from tests.cli_factories import encoder

    return rewrite(*encoder(), form="hedgehog")


@pytest.mark.parametrize("size", [300, 3000, 30_000])
def test_a_rewritten_folder(result: Result, size: int, tmp_path: Path) -> None:
    save_rewritten(result, tmp_path / "old")
    kept = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    assert set(kept) == set(FILES)
    with room_for(size), pytest.raises(ArtifactError, match=r"output .*new: can not be written"):
        save_rewritten(result, tmp_path / "new")
    with room_for(size), pytest.raises(ArtifactError, match=r"output .*old: can not be written"):
        save_rewritten(result, tmp_path / "old")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == kept


def test_an_artifact_is_called_by_its_own_name(result: Result, tmp_path: Path) -> None:
    from codegen.container import write_artifact
    from codegen.manifest import make_manifest
    from codegen.target import target_named

    manifest = make_manifest("tiny", target_named("cpu"), [], [], [], plan=result.plan.to_json())
    with room_for(2000), pytest.raises(ArtifactError, match=r"^mine\.rwa: can not be written"):
        write_artifact(tmp_path / ".x", manifest, b"\0" * 9000, {}, {}, called="mine.rwa")
    assert not list(tmp_path.iterdir())


def test_the_state_of_a_fit_keeps_the_last_good_one(result: Result, tmp_path: Path) -> None:
    state = FitState(tensors={f"now/{n}": p.detach() for n, p in result.model.named_parameters()})
    folder = StateFolder(tmp_path / "state", "key")
    folder.save(state)
    with room_for(3000), pytest.raises(FitError, match="can not be written"):
        folder.save(state)
    again = StateFolder(tmp_path / "state", "key").load()
    assert again is not None
    assert set(again.tensors) == set(state.tensors)
    assert not list(tmp_path.glob("**/*.part"))


def test_text(tmp_path: Path) -> None:
    write_text(tmp_path / "a.html", "old")
    with room_for(100), pytest.raises(ArtifactError, match=r"a\.html: can not be written"):
        write_text(tmp_path / "a.html", "x" * 1000)
    assert (tmp_path / "a.html").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_checks_leave_nothing(tmp_path: Path) -> None:
    check_file(None)
    check_folder(None, FILES)
    check_file(tmp_path / "a.rwa")
    check_folder(tmp_path / "a", FILES)
    assert not list(tmp_path.iterdir())
    make_folder(tmp_path / "b" / "c")
    assert (tmp_path / "b" / "c").is_dir()
    with pytest.raises(PathError, match="create it first"):
        check_file(tmp_path / "no" / "a.rwa")
    with pytest.raises(PathError, match="is not a file"):
        check_file("/dev/null")
