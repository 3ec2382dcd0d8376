"""The kernel cache: what it hits, what it misses, and what a damaged or torn entry does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import codegen.build
from codegen.kernel_cache import Entry, KernelCache, default_cache, key_of
from codegen.target import target_named
from passes.errors import UsageError

KEY = "ab" * 32


def filled(folder: Path, code: bytes = b"code", key: str = KEY) -> KernelCache:
    cache = KernelCache(folder)
    assert cache.put(key, Entry(code, {"kernels": []}))
    return cache


def test_an_entry_comes_back_whole(tmp_path: Path) -> None:
    code = os.urandom(5000) + b"\n\n"
    cache = filled(tmp_path / "new" / "folder", code)
    assert cache.get(KEY) == Entry(code, {"kernels": []})
    assert cache.get("cd" * 32) is None
    assert cache.facts()["entries"] == 1


@pytest.mark.parametrize("where", [0, 70, 200, -1])
def test_a_damaged_entry_is_removed_and_made_anew(tmp_path: Path, where: int) -> None:
    cache = filled(tmp_path, b"x" * 500)
    data = bytearray(cache.path(KEY).read_bytes())
    data[where] ^= 1
    cache.path(KEY).write_bytes(data)
    assert cache.get(KEY) is None
    assert not cache.path(KEY).exists()
    assert cache.put(KEY, Entry(b"y"))
    assert cache.get(KEY) == Entry(b"y")


@pytest.mark.parametrize("kept", [0, 1, 64, 65, 90, 300])
def test_a_cut_off_entry_is_none(tmp_path: Path, kept: int) -> None:
    cache = filled(tmp_path, b"x" * 500)
    cache.path(KEY).write_bytes(cache.path(KEY).read_bytes()[:kept])
    assert cache.get(KEY) is None


def test_an_entry_under_another_name_is_refused(tmp_path: Path) -> None:
    cache, other = filled(tmp_path), "cd" * 32
    cache.path(KEY).rename(cache.path(other))
    assert cache.get(other) is None


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, most=2500)
    keys = [f"{n:064x}" for n in range(3)]
    for age, key in zip((30, 20), keys, strict=False):
        cache.put(key, Entry(b"x" * 900))
        os.utime(cache.path(key), (time.time() - age,) * 2)
    assert cache.get(keys[0]) is not None  # used: now the younger one
    cache.put(keys[2], Entry(b"x" * 900))
    assert [cache.get(k) is not None for k in keys] == [True, False, True]


def test_a_folder_that_can_not_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not KernelCache(tmp_path / "file").put(KEY, Entry(b"x"))
    assert KernelCache(tmp_path / "file").get(KEY) is None


WRITER = """
import sys
from pathlib import Path
from codegen.kernel_cache import Entry, KernelCache
cache = KernelCache(Path(sys.argv[1]))
for _ in range(60):
    cache.put("ab" * 32, Entry(sys.argv[2].encode() * 100_000))
"""


def test_writers_at_once_leave_a_whole_entry(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), word]) for word in "pq"
    ]
    cache, seen = KernelCache(tmp_path), 0
    while any(w.poll() is None for w in writers):
        if (entry := cache.get(KEY)) is not None:
            assert entry.code in (b"p" * 100_000, b"q" * 100_000)
            seen += 1
    assert seen
    assert [w.wait() for w in writers] == [0, 0]
    assert [p.suffix for p in tmp_path.iterdir()] == [".kernels"]


LOOP = """
import sys
from pathlib import Path
from codegen.kernel_cache import Entry, KernelCache
cache = KernelCache(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    cache.put("ab" * 32, Entry(b"k" * 3_000_000))
"""


def test_a_kill_leaves_nothing_torn(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if cache.path(KEY).exists():
            assert cache.get(KEY) == Entry(b"k" * 3_000_000)
    for part in tmp_path.glob(".*.part"):
        os.utime(part, (1, 1))
    cache.put(KEY, Entry(b"whole"))
    assert [p.name for p in tmp_path.iterdir()] == [cache.path(KEY).name]


def test_the_environment_names_the_folder_the_bound_and_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWRITER_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("REWRITER_CACHE_MB", "7")
    cache = default_cache()
    assert cache is not None
    assert (cache.folder, cache.most) == (tmp_path, 7_000_000)
    monkeypatch.setenv("REWRITER_CACHE_MB", "much")
    with pytest.raises(UsageError, match="REWRITER_CACHE_MB"):
        default_cache()
    monkeypatch.setenv("REWRITER_CACHE_DIR", "off")
    assert default_cache() is None
    monkeypatch.delenv("REWRITER_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("REWRITER_CACHE_MB")
    cache = default_cache()
    assert cache is not None
    assert cache.folder == tmp_path / "attention-rewriter" / "kernels"


def small_module(value: float) -> Any:
    from tvm import relax

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            constant = relax.const(np.array([1.0, 2.0, value], "float32"))
            out = builder.emit_output(relax.op.add(x, constant))
        builder.emit_func_output(out)
    return builder.get()


def test_the_key_sees_constants_targets_and_settings() -> None:
    cpu, edge = target_named("cpu"), target_named("edge:cortex-a72")
    keys = {
        key_of(small_module(3.0), cpu),
        key_of(small_module(3.5), cpu),
        key_of(small_module(3.0), edge),
        key_of(small_module(3.0), cpu, allow_unscheduled=True),
    }
    assert len(keys) == 4
    assert key_of(small_module(3.0), cpu) in keys


KEY_OF = """
from tests.artifact.test_kernel_cache import small_module
from codegen.kernel_cache import key_of
from codegen.target import target_named
print(key_of(small_module(3.0), target_named("cpu")))
"""


def test_the_key_is_the_same_in_another_process() -> None:
    root = Path(__file__).parents[2]
    run = [sys.executable, "-c", KEY_OF]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == key_of(small_module(3.0), target_named("cpu"))


class Attention(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unsqueeze(1)
        a = nn.functional.scaled_dot_product_attention(q, q, q)
        return self.out(torch.relu(a.squeeze(1)))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every code generation."""
    calls: list[int] = []
    real: Callable[..., Any] = codegen.build.compile_vm

    def compile_vm(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(codegen.build, "compile_vm", compile_vm)
    return calls


def test_a_second_compile_reuses_the_code_and_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    from rewriter.api import compile as compile_artifact

    monkeypatch.setenv("REWRITER_CACHE_DIR", str(tmp_path / "cache"))
    x = torch.randn(1, 9, 64)

    def made(seed: int, width: int = 64) -> Any:
        data = torch.randn(1, 9, width)
        return compile_artifact(
            Attention(width, seed).eval(), (data,), path=tmp_path / f"{seed}.rwa"
        )

    first, second = made(0), made(0)
    assert len(counted) == 1
    assert second.report["artifact"]["code_from_cache"] is True
    assert first.report["kernels"] == second.report["kernels"]
    with torch.no_grad():
        for seed in (0, 1):  # other weights, same code
            want = Attention(64, seed).eval()(x)
            got = next(iter(made(seed)(x.numpy()).values()))
            np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
    assert len(counted) == 1
    made(0, width=32)
    assert len(counted) == 2


def test_a_damaged_entry_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[int]
) -> None:
    from rewriter.api import compile as compile_artifact

    monkeypatch.setenv("REWRITER_CACHE_DIR", str(tmp_path / "cache"))
    model, x = Attention(16, 0).eval(), torch.randn(1, 9, 16)
    for round_ in range(2):
        compile_artifact(model, (x,), path=tmp_path / "a.rwa")
        assert len(counted) == round_ + 1
        (entry,) = (tmp_path / "cache").iterdir()
        data = bytearray(entry.read_bytes())
        data[len(data) // 2] ^= 255
        entry.write_bytes(data)
