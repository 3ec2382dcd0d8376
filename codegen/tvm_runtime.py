"""Find and load TVM's runtime library: without torch, without the `tvm` package's compiler.

Importing `tvm` loads its 250 MB compiler library, and `tvm_ffi` imports torch where it is
installed; running an artifact needs neither.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from passes.errors import ArtifactError

# A path to libtvm_runtime.so, for a machine that has the library but not the package.
VARIABLE = "REWRITER_TVM_RUNTIME"
_SUFFIX = {"darwin": "dylib"}.get(sys.platform, "so")
_lock = threading.Lock()


class _NoTorch(MetaPathFinder):
    """Makes `import torch` fail in the thread that made it, as if torch were not installed."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """`ModuleNotFoundError` for torch; None (ask the next finder) for all else."""
        if name == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("torch is not needed to run an artifact", name=name)
        return None


@contextmanager
def _without_torch() -> Iterator[None]:
    finder = _NoTorch()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def runtime_library(name: str = "tvm_runtime") -> Path:
    """The path of lib<name>.so next to the `tvm` package, which is not imported.

    `ArtifactError` if there is none. REWRITER_TVM_RUNTIME may name libtvm_runtime.so itself.
    """
    file = f"lib{name}.{_SUFFIX}"
    given = os.environ.get(VARIABLE)
    folders = [Path(given).parent] if given else _package_folders()
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    looked = ", ".join(map(str, folders)) or "no package named tvm"
    raise ArtifactError(
        f"TVM's runtime is missing ({file}; looked in: {looked}); install apache-tvm, or let "
        f"{VARIABLE} name the library"
    )


def _package_folders() -> list[Path]:
    try:
        spec = importlib.util.find_spec("tvm")
    except (ImportError, ValueError):
        spec = None
    roots = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    return [root / sub for root in roots for sub in ("lib", "lib64", ".")]


def load_ffi() -> Any:
    """The module tvm_ffi with TVM's runtime loaded into it; loads both once.

    A torch that is imported already stays as it is; one that is not stays out.
    """
    with _lock:
        return _load()


@functools.cache
def _load() -> Any:
    library = runtime_library()
    try:
        with _without_torch():
            ffi = importlib.import_module("tvm_ffi")
        # Global, so that compiled code finds the symbols it was linked against by name.
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except ImportError as error:
        raise ArtifactError(
            f"tvm_ffi can not be imported ({error}); install apache-tvm-ffi"
        ) from error
    except OSError as error:
        raise ArtifactError(f"TVM's runtime can not be loaded ({error})") from error
    return ffi


@functools.cache
def load_cuda() -> None:
    """Load TVM's CUDA runtime into this process; `ArtifactError` where it can not be."""
    load_ffi()
    try:
        ctypes.CDLL(str(runtime_library("tvm_runtime_cuda")), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ArtifactError(f"TVM's CUDA runtime can not be loaded ({error})") from error


def load_library(code: bytes | memoryview) -> Any:
    """The TVM module in a shared library given as bytes. Runs the library's constructors.

    The bytes go to a file nobody else can reach. RuntimeError if it is not a TVM library.
    """
    load = load_ffi().get_global_func("ffi.Module.load_from_file.so")
    with _private_file(code) as path:
        return load(path, "so")


@contextmanager
def _private_file(code: bytes | memoryview) -> Iterator[str]:
    """A path at which `code` can be opened, gone afterwards. In memory where the system can."""
    fd, path = _open_private()
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(code)
        yield path
    finally:
        os.close(fd)
        if not path.startswith("/proc/"):
            os.unlink(path)


def _open_private() -> tuple[int, str]:
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        fd = os.memfd_create("rewriter-code", os.MFD_CLOEXEC)
        return fd, _unused_name(fd)
    tempfile = importlib.import_module("tempfile")
    fd, path = tempfile.mkstemp(prefix="rewriter-", suffix=f".{_SUFFIX}")
    return int(fd), str(path)


_count = count(1)


def _unused_name(fd: int) -> str:
    """A new spelling of /proc/self/fd/N: the loader takes a known path for a known library."""
    bits = f"{next(_count):b}"
    return "/proc/self/fd" + "".join("/." if bit == "1" else "/" for bit in bits) + f"/{fd}"
