"""What a machine is taken for."""

from __future__ import annotations

import pytest

from codegen.host import (
    Host,
    canonical_arch,
    cuda_devices,
    parse_cpuinfo,
    this_host,
    triple_arch_os,
    why_foreign,
)

X86 = "processor : 0\nflags\t\t: fpu sse2 avx2 avx512f\n\nprocessor : 1\nflags\t\t: fpu sse2 avx2\n"
ARM = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd crc32\nCPU architecture: 8\n"


def test_features_are_those_of_every_core() -> None:
    assert parse_cpuinfo(X86) == {"fpu", "sse2", "avx2"}
    assert parse_cpuinfo(ARM) == {"fp", "asimd", "crc32"}
    assert parse_cpuinfo("") == frozenset()


def test_this_machine() -> None:
    host = this_host()
    assert host.arch in ("x86_64", "aarch64")
    assert host.os in ("linux", "darwin")
    if host.os == "linux":
        assert {"x86_64": "sse2", "aarch64": "asimd"}[host.arch] in host.features
    assert host.cuda == cuda_devices()


@pytest.mark.parametrize(
    ("triple", "wanted"),
    [
        ("x86_64-pc-linux-gnu", ("x86_64", "linux")),
        ("aarch64-linux-gnu", ("aarch64", "linux")),
        ("arm64-apple-darwin23", ("aarch64", "darwin")),
        ("amd64-unknown-linux-musl", ("x86_64", "linux")),
        ("wasm32-unknown-unknown-wasm", ("wasm32", "")),
        ("", ("", "")),
    ],
)
def test_triples(triple: str, wanted: tuple[str, str]) -> None:
    assert triple_arch_os(triple) == wanted


def test_spellings_of_architectures() -> None:
    assert canonical_arch("AMD64") == canonical_arch("x86_64")
    assert canonical_arch("arm64") == canonical_arch("aarch64")


BOARD = Host("aarch64", "linux", frozenset({"asimd"}))


@pytest.mark.parametrize(
    ("target", "needed", "says"),
    [
        ({"triple": "aarch64-linux-gnu", "kind": "edge"}, ("asimd",), ""),
        ({"triple": "aarch64-linux-gnu", "kind": "edge"}, ("asimddp", "asimd"), "asimddp"),
        ({"triple": "x86_64-linux-gnu", "kind": "cpu"}, (), "x86_64 code"),
        ({"triple": "aarch64-apple-darwin", "kind": "cpu"}, (), "code for darwin"),
        ({"triple": "aarch64-linux-gnu", "kind": "gpu"}, (), "needs a CUDA GPU"),
    ],
)
def test_what_a_board_runs(target: dict[str, str], needed: tuple[str, ...], says: str) -> None:
    reason = why_foreign(target, needed, BOARD)
    assert (says in reason) if says else reason == ""


def test_what_a_gpu_runs() -> None:
    host = Host("x86_64", "linux", frozenset(), ((9, 0),))
    base = {"triple": "x86_64-linux-gnu", "kind": "gpu"}
    assert why_foreign({**base, "tvm": {"kind": "cuda", "arch": "sm_90"}}, (), host) == ""
    assert why_foreign({**base, "tvm": {"kind": "cuda", "arch": "sm_90a"}}, (), host) == ""
    assert "sm_80" in why_foreign({**base, "tvm": {"kind": "cuda", "arch": "sm_80"}}, (), host)
    assert "sm_100" in why_foreign({**base, "tvm": {"kind": "cuda", "arch": "sm_100"}}, (), host)
