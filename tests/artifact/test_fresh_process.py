"""What running an artifact loads into a process, and how it lives with torch and the compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from codegen.tvm_runtime import runtime_library
from tests.artifact.conftest import Small

ROOT = Path(__file__).parents[2]

RUN = """
from codegen.runtime import load
artifact = load(sys.argv[1])
given = dict(np.load(sys.argv[2]))
np.savez(sys.argv[3], **artifact.run(given))
"""
NOTHING_HEAVY = """
maps = open("/proc/self/maps").read()
assert "libtvm_runtime.so" in maps
for name in ("libtvm_compiler", "libtorch", "libc10", "_C.cpython"):
    assert name not in maps, name
for name in ("torch", "tvm", "transformers", "scipy", "networkx"):
    assert name not in sys.modules, name
assert not [f for f in sys.meta_path if type(f).__module__.startswith("codegen")]
"""
TORCH_WORKS = """
import torch
assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))
"""
COMPILER_WORKS = """
import tvm
from tvm import te
a = te.placeholder((8,), "float32")
b = te.compute((8,), lambda i: a[i] * 2.0)
mod = tvm.IRModule({"main": te.create_prim_func([a, b])})
x, y = tvm.runtime.tensor(np.arange(8, dtype="f4")), tvm.runtime.empty((8,), "float32")
tvm.compile(mod, target="llvm")["main"](x, y)
assert (y.numpy() == np.arange(8) * 2).all()
"""


def run_fresh(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    head = "import sys\nimport numpy as np\n"
    return subprocess.run(
        [sys.executable, "-c", head + code, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=240,
    )


def check_in_fresh(
    small: Small, file: Path, folder: Path, code: str, quiet: bool = True, **env: str
) -> None:
    inputs = small.inputs(7)
    np.savez(folder / "x.npz", **inputs)
    done = run_fresh(code, file, folder / "x.npz", folder / "y.npz", **env)
    assert done.returncode == 0, done.stderr
    if quiet:
        assert done.stderr == ""
    small.assert_right(dict(np.load(folder / "y.npz")), inputs)


@pytest.mark.parametrize("package", ["codegen.runtime", "rewriter"])
def test_neither_torch_nor_the_compiler_is_loaded(
    small: Small, small_file: Path, tmp_path: Path, package: str
) -> None:
    run = RUN.replace("codegen.runtime", package)
    check_in_fresh(small, small_file, tmp_path, run + NOTHING_HEAVY)


def test_a_runtime_library_elsewhere(small: Small, small_file: Path, tmp_path: Path) -> None:
    """As on a board that has libtvm_runtime.so and no package named tvm."""
    library = Path(shutil.copy(runtime_library(), tmp_path))
    hide = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "tvm" else find(name, *a)
"""
    used = f"\nassert {str(library)!r} in open('/proc/self/maps').read()\n"
    check_in_fresh(
        small,
        small_file,
        tmp_path,
        hide + RUN + NOTHING_HEAVY + used,
        REWRITER_TVM_RUNTIME=str(library),
    )


@pytest.mark.parametrize(
    "parts",
    [
        (TORCH_WORKS, COMPILER_WORKS, RUN, TORCH_WORKS, COMPILER_WORKS),
        (RUN, NOTHING_HEAVY, COMPILER_WORKS, RUN, TORCH_WORKS, RUN),
    ],
    ids=["they-first", "they-later"],
)
def test_lives_beside_torch_and_the_compiler(
    small: Small, small_file: Path, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    check_in_fresh(small, small_file, tmp_path, "".join(parts))


@pytest.mark.slow
def test_torch_models_compile_after_an_artifact_ran(
    small: Small, small_file: Path, tmp_path: Path
) -> None:
    """TVM's bridge to torch works although tvm_ffi was first imported without torch."""
    compile_one = """
import torch, tvm
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program
class M(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3, 3))
    def forward(self, x):
        return x @ self.w
mod = from_exported_program(torch.export.export(M(), (torch.ones(2, 3),)))
vm = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
y = vm["main"](tvm.runtime.tensor(np.ones((2, 3), "f4")))
assert (np.from_dlpack(y[0]) == 3).all()
assert (torch.from_dlpack(y[0]) == 3).all()
"""
    check_in_fresh(small, small_file, tmp_path, RUN + compile_one + RUN, quiet=False)


def test_runs_with_a_closed_temporary_folder_and_many_or_one_thread(
    small: Small, small_file: Path, tmp_path: Path
) -> None:
    for threads in ("1", "2"):
        check_in_fresh(
            small, small_file, tmp_path, RUN, TMPDIR="/nonexistent", TVM_NUM_THREADS=threads
        )


def test_missing_runtime_is_one_clear_error(small_file: Path) -> None:
    code = """
from codegen.runtime import load
from passes.errors import ArtifactError
try:
    load(sys.argv[1])
except ArtifactError as error:
    assert "TVM's runtime is missing" in str(error) and "/nowhere" in str(error), error
else:
    raise SystemExit("loaded without a runtime")
"""
    done = run_fresh(code, small_file, REWRITER_TVM_RUNTIME="/nowhere/libtvm_runtime.so")
    assert done.returncode == 0, done.stderr


def test_checking_a_file_needs_no_runtime(small_file: Path) -> None:
    code = """
from codegen.container import describe, open_artifact
assert describe(sys.argv[1]).name == "small"
open_artifact(sys.argv[1])
assert "tvm_ffi" not in sys.modules and "torch" not in sys.modules
assert "libtvm" not in open("/proc/self/maps").read()
"""
    done = run_fresh(code, small_file)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_reaches_the_caller(small_file: Path) -> None:
    """A caller that waits for a worker gets KeyboardInterrupt at once and may call again."""
    code = """
import os, signal, threading
from codegen import workers
from codegen.runtime import load
artifact = load(sys.argv[1])
pool, began, end = workers.pool_of(artifact.threads), threading.Event(), threading.Event()
def interrupt():
    began.wait(60)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    pool.call(lambda worker: (began.set(), end.wait(60)))
except KeyboardInterrupt:
    end.set()
else:
    raise SystemExit("not interrupted")
x = np.zeros((5, 48), "f4")
artifact.run({"x": x, "ids": np.zeros(7, "i8")})
"""
    done = run_fresh(code, small_file)
    assert done.returncode == 0, done.stderr
