"""Run an artifact made for an edge board here, under qemu-user, through the C++ runner.

Needs the cross compiler, qemu-user and TVM's runtime for the board's processor; `runtime_folder`
says where the last is looked for, and `python -m codegen.edge.fetch` puts it there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codegen.archive import open_artifact
from codegen.specs import TensorSpec
from passes.errors import LoweringError

SYSROOT = "/usr/aarch64-linux-gnu"
COMPILER = "aarch64-linux-gnu-g++"
QEMU = "qemu-aarch64"


def runtime_folder() -> Path:
    """Where the aarch64 wheels of TVM are unpacked: $REWRITER_EDGE_RUNTIME or a user cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("REWRITER_EDGE_RUNTIME", cache / "attention-rewriter" / "aarch64"))


def missing() -> str:
    """What is missing to run an edge artifact here, in words; "" when nothing is."""
    for tool in (COMPILER, QEMU):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)"
    if not (runtime_folder() / "tvm" / "lib" / "libtvm_runtime.so").is_file():
        return f"no aarch64 runtime in {runtime_folder()} (python -m codegen.edge.fetch)"
    return ""


@dataclass(frozen=True)
class Board:
    """A compiled runner and how to start it."""

    command: tuple[str, ...]

    @classmethod
    def qemu(cls, folder: Path) -> Board:
        """Compile the runner for aarch64 into `folder`; it runs under qemu-user."""
        if missing():
            raise LoweringError(f"an edge artifact can not be run here: {missing()}")
        runtime = runtime_folder()
        libraries = [runtime / "tvm_ffi" / "lib", runtime / "tvm" / "lib"]
        runner = folder / "runner"
        command = [
            COMPILER, "-O2", "-std=c++17", f"-I{runtime / 'tvm_ffi' / 'include'}",
            str(Path(__file__).parent / "runner.cc"), "-o", str(runner),
            *(f"-L{lib}" for lib in libraries),
            "-ltvm_ffi", "-Wl,--no-as-needed", "-ltvm_runtime", "-Wl,--allow-shlib-undefined",
        ]  # fmt: skip
        _call(command, "compiling the runner")
        path = ":".join(str(lib) for lib in libraries)
        return cls((QEMU, "-L", SYSROOT, "-E", f"LD_LIBRARY_PATH={path}", str(runner)))

    def run(self, artifact: Path, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs of `artifact` for `inputs` (name -> array), computed on the board."""
        with tempfile.TemporaryDirectory(prefix="rewriter-board-") as scratch:
            folder = Path(scratch)
            specs = _unpack(artifact, inputs, folder)
            arguments = [str(folder / "code.so"), str(folder / "call.txt"), scratch]
            _call([*self.command, *arguments], "running on the board")
            return {
                spec.name: np.fromfile(folder / f"out{i}.bin", spec.dtype).reshape(spec.shape)
                for i, spec in enumerate(specs)
            }


def _unpack(
    artifact: Path, inputs: Mapping[str, NDArray[Any]], folder: Path
) -> Sequence[TensorSpec]:
    """Write code.so, the arguments' values and call.txt; returns the output specs."""
    opened = open_artifact(artifact)
    manifest, weights = opened.manifest, opened.arrays()
    (folder / "code.so").write_bytes(opened.code)
    arrays = [inputs[spec.name] for spec in manifest.inputs]
    arrays += [weights[name] for name in manifest.weights]
    lines = [_argument(folder, f"argument{i}", array) for i, array in enumerate(arrays)]
    (folder / "call.txt").write_text("\n".join(lines) + "\n")
    return manifest.outputs


def _argument(folder: Path, name: str, array: NDArray[Any]) -> str:
    path = folder / f"{name}.bin"
    np.ascontiguousarray(array).tofile(path)
    dims = " ".join(str(d) for d in array.shape)
    return f"{array.dtype} {array.ndim} {dims} {path} 0"


def _call(command: Sequence[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoweringError(f"{what} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
