"""Kernels for CUDA compiled ahead of time: nvcc here, a cubin inside the shared library.

TVM puts CUDA source into a library it builds on a machine without a GPU, and compiles it where the
library is loaded, which needs a compiler there. Here nvcc compiles the source while TVM makes the
library; in the library the source's place is kept by a filler of the cubin's length, which is then
exchanged for the cubin.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tvm_ffi

from codegen.target import Target
from passes.errors import LoweringError

_POSTPROC = "tvm_callback_cuda_postproc"
_FALLBACK = "TVM_COMPILE_FORCE_FALLBACK"
_SOURCE, _BINARY = "cuda", "cubin"
_USUAL = "/usr/local/cuda/bin"
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(')


def find_nvcc() -> str | None:
    """nvcc on PATH, or where CUDA is usually installed; None if there is none."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=_USUAL)


def kernel_names(source: str) -> tuple[str, ...]:
    """The __global__ functions of CUDA source, each once, in order."""
    return tuple(dict.fromkeys(_KERNEL.findall(source)))


def compile_cubin(source: str, arch: str) -> bytes:
    """`source` as a cubin for `arch` ("sm_90"), with IEEE division and no fast-math.

    Raises:
        LoweringError: nvcc is missing or refuses the source.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise LoweringError(
            "CUDA kernels are compiled by nvcc, which is neither on PATH nor in "
            f"{_USUAL}; install the CUDA toolkit"
        )
    with tempfile.TemporaryDirectory(prefix="rewriter_") as folder:
        Path(folder, "kernels.cu").write_text(source)
        command = [nvcc, "-cubin", f"-arch={arch}", "-O3", "-o", "kernels.cubin", "kernels.cu"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            told = (done.stderr or done.stdout).strip()[-2000:]
            raise LoweringError(f"nvcc refused the generated kernels: {told}")
        return Path(folder, "kernels.cubin").read_bytes()


@dataclass
class Embedding:
    """Sources compiled while a library was made, and their exchange in its bytes."""

    arch: str
    sources: list[str] = field(default_factory=list)
    cubins: dict[bytes, bytes] = field(default_factory=dict)

    def take(self, source: str) -> str:
        """Compile `source`; the filler that stands for it, one longer than the cubin.

        The word "cubin" is one longer than the word "cuda", so that all lengths add up again.
        """
        cubin = compile_cubin(source, self.arch)
        name = f"cubin:{hashlib.sha256(cubin).hexdigest()}:"
        filler = name.ljust(len(cubin) + 1, ".")
        self.sources.append(source)
        self.cubins[filler.encode()] = cubin
        return filler

    def put(self, code: bytes) -> bytes:
        """`code` (a shared library) with every filler exchanged for its cubin.

        TVM's form of a CUDA module: the word for its format, a map of its functions, its data;
        each string after its length (8 bytes).

        Raises:
            LoweringError: the library does not have this form.
        """
        for filler, cubin in self.cubins.items():
            old_data, new_data = _text(filler), _text(cubin)
            at = code.find(old_data)
            head = code.rfind(_text(_SOURCE.encode()), 0, at)
            if at < 0 or head < 0 or code.find(old_data, at + 1) >= 0:
                raise LoweringError("TVM's shared library does not hold CUDA code as expected")
            functions = code[head + len(_text(_SOURCE.encode())) : at]
            made = _text(_BINARY.encode()) + functions + new_data
            code = code[:head] + made + code[at + len(old_data) :]
        return code


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@contextlib.contextmanager
def embedding(target: Target) -> Iterator[Embedding]:
    """While inside, CUDA source that TVM generates for `target` is compiled by nvcc."""
    made = Embedding(str(target.tvm.get("arch", "")))
    if target.kind != "gpu":
        yield made
        return
    before = os.environ.get(_FALLBACK)
    # Also where there is a GPU: TVM's own compilation at build time would see the filler.
    os.environ[_FALLBACK] = "1"
    try:
        with _registered(_POSTPROC, lambda source, _target: made.take(source)):
            yield made
    finally:
        if before is None:
            del os.environ[_FALLBACK]
        else:
            os.environ[_FALLBACK] = before


@contextlib.contextmanager
def _registered(name: str, function: Callable[..., str]) -> Iterator[None]:
    before = tvm_ffi.get_global_func(name, allow_missing=True)
    tvm_ffi.register_global_func(name, function, override=True)
    try:
        yield
    finally:
        tvm_ffi.remove_global_func(name)
        if before is not None:
            tvm_ffi.register_global_func(name, before)
