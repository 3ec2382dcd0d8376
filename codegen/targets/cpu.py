"""The processor this process runs on, with the vector units the kernel lets it use."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from codegen.host import canonical_arch, cpu_features
from codegen.target import Target, usable_cores

# x86-64 levels as LLVM names them, and what they need in the words of /proc/cpuinfo.
_V3 = ("avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
# Optional features: word of /proc/cpuinfo -> LLVM's name. AMX is left out: no kernel uses it.
_EXTRAS = {
    "avx512_vnni": "avx512vnni",
    "avx512_bf16": "avx512bf16",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx512_bitalg": "avx512bitalg",
    "avx512vbmi": "avx512vbmi",
}


# x86-64-v3 with the 256-bit VNNI of later processors.
_EXTRAS_V3 = {"avx_vnni": "avxvnni"}


def target() -> Target:
    """The target `cpu`; reads the machine when called, not at import."""
    arch, features = canonical_arch(platform.machine()), cpu_features()
    if arch == "aarch64":
        return _arm(features)
    return _x86(features)


def _x86(features: frozenset[str]) -> Target:
    extras: tuple[str, ...] = ()
    names: dict[str, str] = {}
    needed: tuple[str, ...]
    if features.issuperset(_V4):
        level, needed, width, registers = "x86-64-v4", _V4, 64, 32
        names = _EXTRAS
        extras = tuple(sorted(features.intersection(names)))
    elif features.issuperset(_V3):
        level, needed, width, registers = "x86-64-v3", _V3, 32, 16
        names = _EXTRAS_V3
        extras = tuple(sorted(features.intersection(names)))
    else:
        level, needed, width, registers = "x86-64", (), 16, 16
    tvm: dict[str, Any] = {
        "kind": "llvm",
        "mtriple": "x86_64-unknown-linux-gnu",
        "mcpu": level,
        "num-cores": usable_cores(),
        "opt-level": 3,
    }
    if extras:
        tvm["mattr"] = [f"+{names[word]}" for word in extras]
    if width == 64:
        # LLVM tunes x86-64-v4 for 256 bit and would split our vectors (attention: 20 % slower).
        tvm["mattr"] = [*tvm.get("mattr", []), "-prefer-256-bit"]
    return Target(
        name="cpu",
        kind="cpu",
        triple="x86_64-unknown-linux-gnu",
        tvm=tvm,
        features=tuple(sorted((*needed, *extras))),
        vector_bytes=width,
        vector_registers=registers,
        l1_bytes=_cache_bytes(1, 32 * 1024),
        l2_bytes=_cache_bytes(2, 1024 * 1024),
        description=f"this machine's processor ({level}, {usable_cores()} cores)",
        options=_options(extras),
    )


def _options(extras: tuple[str, ...]) -> dict[str, Any]:
    """{"bf16": "widen"} where float32's multiply-adds beat the dot products of bfloat16.

    Intel's AVX-512 units take a vdpbf16ps only every second cycle (Emerald Rapids, measured), half
    of float32's rate (its fast bfloat16 is AMX); AMD's take two a cycle.
    """
    slow = "avx512_bf16" in extras and _vendor() == "GenuineIntel"
    return {"bf16": "widen"} if slow else {}


def _vendor() -> str:
    """The processor's maker as /proc/cpuinfo spells it; "" where it is not told."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((v.strip() for k, _, v in (x.partition(":") for x in lines)
                 if k.strip() == "vendor_id"), "")  # fmt: skip


def _arm(features: frozenset[str]) -> Target:
    tvm = {
        "kind": "llvm",
        "mtriple": "aarch64-linux-gnu",
        "mcpu": "generic",
        "mattr": ["+neon"],
        "num-cores": usable_cores(),
        "opt-level": 3,
    }
    return Target(
        name="cpu",
        kind="cpu",
        triple="aarch64-linux-gnu",
        tvm=tvm,
        features=tuple(sorted(features.intersection(("asimd",)))),
        vector_bytes=16,
        vector_registers=32,
        l1_bytes=_cache_bytes(1, 32 * 1024),
        l2_bytes=_cache_bytes(2, 512 * 1024),
        description=f"this machine's processor (aarch64 with NEON, {usable_cores()} cores)",
    )


def _cache_bytes(level: int, default: int) -> int:
    """Size of the first core's data (or unified) cache at `level`, `default` if not told."""
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            at = int((folder / "level").read_text())
            kind = (folder / "type").read_text().strip()
            size = (folder / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if at == level and kind != "Instruction" and size[:-1].isdigit():
            return int(size[:-1]) * {"K": 1024, "M": 1024**2}.get(size[-1], 1)
    return default
