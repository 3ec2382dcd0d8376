"""From scheduled TensorIR to the bytes of a shared library."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, tirx

from codegen import cuda, tvm_env
from codegen.kernel_cache import Entry, KernelCache
from codegen.lower import Lowered
from codegen.target import Target
from passes.errors import LoweringError

# Anything that links a shared library from an object file, in order of preference.
_LINKERS = ("gcc", "cc", "clang")
_BARE_LINKERS = ("ld", "ld.lld")
_ZIG = "ziglang"


@dataclass(frozen=True)
class Built:
    """A shared library. `library_kind` is what runs it: "vm_bytecode" (TVM's Relax VM)."""

    code: bytes
    library_kind: str = "vm_bytecode"


def build(lowered: Lowered, target: Target, *, cache: KernelCache | None = None) -> Built:
    """Compile and link `lowered` for `target`; the same module gives the same bytes.

    Code that `lower` found in the cache is taken as it is; what is built is kept in `cache`.

    Raises:
        LoweringError: no linker was found, the linker failed, or code generation failed.
    """
    if lowered.code is not None:
        return Built(lowered.code)
    code = _library(lowered, target)
    if cache is not None and lowered.key:
        cache.put(lowered.key, Entry(code, lowered.facts()))
    return Built(code)


def _library(lowered: Lowered, target: Target) -> bytes:
    linker = find_linker(target)
    with cuda.embedding(target) as kernels:
        executable = compile_vm(lowered, target)
    with tempfile.TemporaryDirectory(prefix="rewriter_") as folder:
        path = Path(folder) / "code.so"
        try:
            executable.export_library(str(path), fcompile=linker)
        except RuntimeError as error:
            raise LoweringError(f"linking for {target.name} failed: {error}") from error
        return kernels.put(path.read_bytes())


def compile_vm(lowered: Lowered, target: Target) -> Any:
    """The TVM executable, in this process: for tests and timings (`relax.VirtualMachine`)."""
    with tvm_env.lowering_for(target):
        return relax.build(
            lowered.mod, target=tvm_env.tvm_target(target), relax_pipeline=_pipeline()
        )


def _pipeline() -> Any:
    t = relax.transform
    return tvm.transform.Sequential(
        [
            t.LowerAllocTensor(),
            t.KillAfterLastUse(),
            t.LowerRuntimeBuiltin(),
            t.ComputePrimValue(),
            t.VMShapeLower(),
            t.AttachGlobalSymbol(),
            no_alias_all,
        ]
    )


def _mark_no_alias(mod: Any, _context: Any) -> Any:
    for gv, func in list(mod.functions_items()):
        if isinstance(func, tirx.PrimFunc) and not (func.attrs or {}).get("tirx.noalias"):
            mod.update_func(gv, func.with_attr("tirx.noalias", True))
    return mod


# TVM's LLVM code generator keeps one flag for the whole module, set by the last function declared:
# a single function without noalias makes every kernel spill its accumulators.
no_alias_all = tvm.transform.module_pass(_mark_no_alias, opt_level=0, name="NoAliasAll")


def find_linker(target: Target) -> Any:
    """A TVM `fcompile` that links shared libraries for `target`, by `target.options["cc"]` first.

    An entry "ziglang:TRIPLE" is the compiler of the Python package ziglang.
    """
    wanted = target.options.get("cc")
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted or (*_LINKERS, _ZIG))
    for name in names:
        command = _command(name)
        if command:
            return _link_with([*command, "-shared", "-fPIC"])
    if not wanted:
        for name in _BARE_LINKERS:
            if shutil.which(name):
                return _link_with([name, "-shared"])
    raise LoweringError(
        f"no linker for {target.name}: looked for {', '.join(names)}; install gcc or clang, or "
        "the Python package ziglang"
    )


def _command(name: str) -> list[str]:
    base, _, triple = name.partition(":")
    if base != _ZIG:
        return [base] if shutil.which(base) else []
    package = importlib.util.find_spec(_ZIG)
    if package is None or package.origin is None:
        return []
    zig = Path(package.origin).parent / "zig"
    return [str(zig), "cc", *(["-target", triple] if triple else [])]


def _link_with(command: Sequence[str]) -> Any:
    def link(output: str, objects: Sequence[str], **_options: Any) -> None:
        # A library name without the path keeps the bytes the same wherever they are made.
        done = subprocess.run(
            [*command, "-o", output, *objects], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")

    link.output_format = "so"  # type: ignore[attr-defined]
    return link
