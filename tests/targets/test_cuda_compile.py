"""cuda:sm_90 without a GPU: every kernel scheduled, within limits, and compiled by nvcc."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from codegen import cuda
from codegen.archive import describe
from codegen.build import build, compile_vm
from codegen.foreign import ForeignArtifact
from codegen.host import cuda_devices
from passes.errors import ArtifactError, LoweringError
from rewriter import compile, load
from tests.targets import cuda_models
from tests.targets.cuda_models import FORMS, MODELS, TARGET, lowered
from tests.targets.gpu_loops import bound_loops

PAIRS = [(m, f) for m in MODELS for f in FORMS]
needs_nvcc = pytest.mark.skipif(cuda.find_nvcc() is None, reason="nvcc is not installed")
_BOUNDS = re.compile(r"__launch_bounds__\((\d+)\)")
_SHARED = re.compile(r"__shared__ .*?(float|half|int|uchar|signed char) \w+\[(\d+)\];")
_BYTES = {"float": 4, "int": 4, "half": 2, "uchar": 1, "signed char": 1}
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")


def _bodies(source: str) -> dict[str, str]:
    """Kernel name -> its definition's text."""
    parts = re.split(r'(?=extern "C" __global__)', source)[1:]
    return {cuda.kernel_names(p)[0]: p for p in parts if "{" in p.split("\n", 1)[0]}


@functools.cache
def source_of(model: str, form: str) -> str:
    """The CUDA source TVM makes for the model."""
    library = compile_vm(lowered(model, form), TARGET).mod
    while library.kind != "cuda":
        (library,) = library.imports
    return str(library.inspect_source())


@pytest.mark.parametrize(("model", "form"), PAIRS)
def test_every_kernel_has_a_rule_and_is_parallel(model: str, form: str) -> None:
    result = lowered(model, form)
    assert all(k.scheduled_by.startswith("gpu_") for k in result.kernels)
    bodies = _bodies(source_of(model, form))
    assert len(bodies) >= len(result.kernels)
    for kernel in result.kernels:
        assert any(name.startswith(kernel.name) for name in bodies), kernel.name
    limits = TARGET.tvm
    for name, body in bodies.items():
        threads = int(_BOUNDS.search(body)[1])  # type: ignore[index]
        assert 32 <= threads <= limits["max_threads_per_block"], name
        assert threads % 32 == 0
        assert "threadIdx.x" in body, name
        shared = sum(_BYTES[kind] * int(n) for kind, n in _SHARED.findall(body))
        assert body.count("__shared__") == len(_SHARED.findall(body))
        assert shared <= limits["max_shared_memory_per_block"], name


def test_big_kernels_use_many_blocks() -> None:
    # Two sentences of 37 tokens, three heads: tiles of eight queries are 2 * 3 * 5 blocks.
    assert _extents("bert", "exact", "attention") == ([2 * 3 * 5], {8}, {32})
    # Rows of layer norm, eight (one warp each) in a block.
    assert _extents("bert", "exact", "layer_norm") == ([2 * 5], {8}, {32})
    for model, form in (("bert", "hedgehog"), ("gpt2", "elu")):
        name = next(k.name for k in lowered(model, form).kernels if "linear_att" in k.name)
        assert max(_extents(model, form, name)[0]) > 1


def _extents(model: str, form: str, name: str) -> tuple[list[int], set[int], set[int]]:
    """Blocks of each loop nest of a scheduled kernel, and its threads along y and x."""
    found: dict[str, list[int]] = {"blockIdx.x": [], "threadIdx.y": [], "threadIdx.x": []}
    for tag, extent in bound_loops(lowered(model, form).mod[name]):
        found[tag].append(extent)
    grid, rows, lanes = found.values()
    return grid, set(rows), set(lanes)


@pytest.mark.parametrize(("model", "form"), PAIRS)
def test_no_lane_leaves_a_sum_in_shared_memory(model: str, form: str) -> None:
    """TVM puts no barrier between lane 0's write and the other lanes' reads at its index."""
    assert not re.search(r"shared_ptr\[[^;]*\] = \(?red_buf", source_of(model, form))


@needs_nvcc
@pytest.mark.parametrize(("model", "form"), PAIRS)
def test_nvcc_compiles_every_kernel(model: str, form: str, tmp_path: Path) -> None:
    source = source_of(model, form)
    names = set(cuda.kernel_names(source))
    assert names == set(_bodies(source))
    path = tmp_path / "kernels.cu"
    path.write_text(source)
    command = [str(cuda.find_nvcc()), "-cubin", "-arch=sm_90", "-O1", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "k.cubin"), str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert set(_ENTRY.findall(done.stderr)) == names
    for registers in re.findall(r"Used (\d+) registers", done.stderr):
        assert int(registers) <= 255


@needs_nvcc
def test_the_library_holds_a_cubin_and_no_source() -> None:
    lower = lowered("gpt2", "elu")
    code = build(lower, TARGET).code
    at = code.index(b"\x05\x00\x00\x00\x00\x00\x00\x00cubin")
    assert code.index(b"\x7fELF", at) > at
    assert b"__global__" not in code
    assert b"cubin:" not in code
    assert build(lower, TARGET).code == code


@needs_nvcc
@pytest.mark.skipif(bool(cuda_devices()), reason="a GPU is here: the artifact runs")
def test_an_artifact_is_made_and_refused_here(tmp_path: Path) -> None:
    result = cuda_models.rewritten("vit", "exact")
    path = tmp_path / "vit.rwa"
    made = compile(result, path=path, target="cuda:sm_90")
    assert isinstance(made, ForeignArtifact)
    assert describe(path).target["name"] == "cuda:sm_90"
    assert all(k["scheduled_by"].startswith("gpu_") for k in made.report["kernels"])
    assert any("CUDA GPU" in note for note in made.report["notes"])
    with pytest.raises(ArtifactError, match="needs a CUDA GPU"):
        load(path)


def test_refused_source_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if cuda.find_nvcc() is not None:
        with pytest.raises(LoweringError, match="nvcc refused"):
            cuda.compile_cubin("__global__ void f( {", "sm_90")
    monkeypatch.setattr(cuda, "find_nvcc", lambda: None)
    with pytest.raises(LoweringError, match="install the CUDA toolkit"):
        cuda.compile_cubin("", "sm_90")


def test_a_library_of_another_form_is_an_error() -> None:
    made = cuda.Embedding("sm_90")
    made.cubins[b"cubin:x."] = b"\x7fELFabc"
    with pytest.raises(LoweringError, match="as expected"):
        made.put(b"no such filler")


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_devices(), reason="no CUDA GPU (or no driver) on this machine")
@needs_nvcc
@pytest.mark.parametrize(("model", "form"), PAIRS)
def test_the_artifact_equals_eager_on_the_gpu(model: str, form: str, tmp_path: Path) -> None:
    result = cuda_models.rewritten(model, form)
    path = tmp_path / "model.rwa"
    compile(result, path=path, target="cuda:sm_90")
    with load(path) as artifact:
        inputs = [a.numpy() for a in cuda_models.arrays(result)]
        outputs = list(artifact(*inputs).values())
        again = list(artifact(*inputs).values())
    for have, repeat, want in zip(outputs, again, cuda_models.wanted(result), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-4, rtol=1e-4)
        assert (have == repeat).all()
