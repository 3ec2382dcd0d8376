"""Fetch TVM's aarch64 runtime (the wheels of the versions installed here) for runs under qemu.

Run as ``python -m codegen.edge.fetch``; pip downloads, nothing of the wheels is executed.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from codegen.edge.board import runtime_folder

PACKAGES = ("apache-tvm", "apache-tvm-ffi")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_24_aarch64", "manylinux2014_aarch64")


def fetch(folder: Path) -> None:
    """Unpack the aarch64 wheels of the installed versions into `folder` (once)."""
    marker = folder / ".versions"
    wanted = " ".join(f"{p}=={importlib.metadata.version(p)}" for p in PACKAGES)
    if marker.is_file() and marker.read_text() == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        python = f"{sys.version_info.major}{sys.version_info.minor}"
        platforms = [word for p in PLATFORMS for word in ("--platform", p)]
        command = [
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
            "--python-version", python, *platforms, "-d", scratch, *wanted.split(),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if _needed(n)]
                archive.extractall(folder, names)
    marker.write_text(wanted)


def _needed(name: str) -> bool:
    libraries = ("libtvm_runtime.so", "libtvm_runtime_extra.so", "libtvm_ffi.so")
    return name.startswith("tvm_ffi/include/") or name.rsplit("/", 1)[-1] in libraries


if __name__ == "__main__":
    fetch(runtime_folder())
    sys.stdout.write(f"aarch64 runtime in {runtime_folder()}\n")
