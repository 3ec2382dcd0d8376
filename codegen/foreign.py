"""ForeignArtifact: an artifact made for another machine, which can be looked at but not run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from codegen.archive import open_artifact
from codegen.specs import TensorSpec
from passes.errors import ArtifactError


class ForeignArtifact:
    """Manifest, inputs, outputs and report of the file at `path`, every byte of it checked."""

    def __init__(self, path: Path) -> None:
        """Read the file; `ArtifactError` if it is damaged."""
        opened = open_artifact(path)
        self.path, self.manifest, self.report = opened.path, opened.manifest, opened.report

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape, dtype and range of each input, in order."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape and dtype of each output, in order."""
        return self.manifest.outputs

    def run(self, inputs: Mapping[str, Any]) -> NoReturn:
        """`ArtifactError`: this machine is not the one the code was made for."""
        made_for = self.manifest.target.get("name", "?")
        raise ArtifactError(f"{self.path}: made for {made_for} and can not run on this machine")
