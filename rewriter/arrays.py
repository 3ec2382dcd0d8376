"""Arrays in .npz files: read without unpickling, written beside and renamed."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes.errors import ArtifactError, InputError


def read_arrays(path: Path, option: str = "--input") -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise InputError(f"{option} {path}: there is no such file") from error
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(
            f"{option} {path}: not an .npz of plain arrays ({error}); write one with numpy.savez"
        ) from error


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write an .npz beside, then rename."""
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ArtifactError(f"--output {path}: can not be written ({error.strerror})") from error
