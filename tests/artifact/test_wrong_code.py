"""Files that are whole but whose code does not fit their manifest: an error, never a crash."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from codegen.runtime import load
from codegen.specs import TensorSpec
from passes.errors import ArtifactError
from tests.artifact.conftest import OUT, ROWS, Small


def test_code_that_is_no_library(small: Small, tmp_path: Path) -> None:
    for i, code in enumerate((b"", b"text", small.code[:64])):
        path = dataclasses.replace(small, code=code).write(tmp_path / f"{i}.rwa")
        with pytest.raises(ArtifactError, match="can not be loaded"):
            load(path)


def test_entry_that_does_not_exist(small: Small, tmp_path: Path) -> None:
    manifest = dataclasses.replace(small.manifest, entry="forward")
    path = dataclasses.replace(small, manifest=manifest).write(tmp_path / "a.rwa")
    with pytest.raises(ArtifactError, match="no function 'forward'"):
        load(path)


def test_another_number_of_arguments(small: Small, tmp_path: Path) -> None:
    manifest = dataclasses.replace(small.manifest, inputs=small.manifest.inputs[:1])
    path = dataclasses.replace(small, manifest=manifest).write(tmp_path / "a.rwa")
    with pytest.raises(ArtifactError, match="takes 5 arguments; the manifest names 4"):
        load(path)


def test_weight_of_another_shape_fails_at_the_call(small: Small, tmp_path: Path) -> None:
    weights = {**small.weights, "b": small.weights["b"][:-1]}
    path = dataclasses.replace(small, weights=weights).write(tmp_path / "a.rwa")
    artifact = load(path)
    with pytest.raises(ArtifactError, match="code failed"):
        artifact.run(small.inputs(0))
    with pytest.raises(ArtifactError, match="code failed"):
        artifact.run(small.inputs(0))


def test_another_number_of_outputs(small: Small, tmp_path: Path) -> None:
    outputs = (TensorSpec("y", (ROWS, OUT), "float32"),)
    manifest = dataclasses.replace(small.manifest, outputs=outputs)
    path = dataclasses.replace(small, manifest=manifest).write(tmp_path / "a.rwa")
    with pytest.raises(ArtifactError, match="gave 3 outputs; the manifest names 1"):
        load(path).run(small.inputs(0))
