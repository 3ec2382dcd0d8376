"""What this machine is: architecture, operating system, processor features, GPUs.

Features are in the words of /proc/cpuinfo ("flags" on x86, "Features" on ARM), which list what the
kernel lets a process use. Nothing here imports torch or tvm.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SAME_ARCH = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
# Attributes of cuDeviceGetAttribute: compute capability, major and minor.
_CUDA_CC_MAJOR, _CUDA_CC_MINOR = 75, 76


@dataclass(frozen=True)
class Host:
    """One machine. `cuda` holds the compute capability of each GPU, such as (9, 0)."""

    arch: str
    os: str
    features: frozenset[str] = frozenset()
    cuda: tuple[tuple[int, int], ...] = ()

    @property
    def words(self) -> str:
        """For messages: "x86_64 linux"."""
        return f"{self.arch} {self.os}"


def this_host() -> Host:
    """The machine this process runs on."""
    return Host(
        canonical_arch(platform.machine()), _os_of(sys.platform), cpu_features(), cuda_devices()
    )


def canonical_arch(name: str) -> str:
    """One spelling for each architecture: amd64 is x86_64, arm64 is aarch64."""
    lower = name.lower()
    return _SAME_ARCH.get(lower, lower)


def _os_of(text: str) -> str:
    for word in ("linux", "darwin", "windows", "win32"):
        if word in text:
            return "windows" if word == "win32" else word
    return text


def triple_arch_os(triple: str) -> tuple[str, str]:
    """("x86_64", "linux") of "x86_64-pc-linux-gnu"; the second is "" where none is named."""
    head, _, rest = triple.partition("-")
    system = _os_of(rest)
    return canonical_arch(head), system if system in ("linux", "darwin", "windows") else ""


@functools.cache
def cpu_features() -> frozenset[str]:
    """Features the kernel offers; empty where there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return frozenset()
    return parse_cpuinfo(text)


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Features that every processor of a /proc/cpuinfo text has (big and little cores differ)."""
    found: list[frozenset[str]] = []
    for line in text.splitlines():
        key, _, words = line.partition(":")
        if key.strip() in ("flags", "Features"):
            found.append(frozenset(words.split()))
    return frozenset.intersection(*found) if found else frozenset()


@functools.cache
def cuda_devices() -> tuple[tuple[int, int], ...]:
    """Compute capability of each GPU the CUDA driver shows; empty without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_capability(cuda, i) for i in range(count.value))


def _capability(cuda: ctypes.CDLL, index: int) -> tuple[int, int]:
    device, value, pair = ctypes.c_int(0), ctypes.c_int(0), []
    cuda.cuDeviceGet(ctypes.byref(device), index)
    for attribute in (_CUDA_CC_MAJOR, _CUDA_CC_MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        pair.append(value.value)
    return pair[0], pair[1]


def why_foreign(target: Mapping[str, Any], needed: Sequence[str], host: Host) -> str:
    """Why `host` can not run code for `target` (a Target as plain data); "" when it can."""
    arch, system = triple_arch_os(str(target.get("triple", "")))
    if arch and arch != host.arch:
        return f"it holds {arch} code and this machine is {host.words}"
    if system and system != host.os:
        return f"it holds code for {system} and this machine runs {host.os}"
    if target.get("kind") == "gpu":
        return _why_no_gpu(target, host)
    missing = sorted(set(needed) - host.features)
    if missing:
        return f"its code needs processor features this machine lacks: {', '.join(missing)}"
    return ""


def _why_no_gpu(target: Mapping[str, Any], host: Host) -> str:
    if not host.cuda:
        return "it needs a CUDA GPU and this machine has none (or no driver)"
    wanted = _wanted_capability(dict(target.get("tvm") or {}).get("arch", ""))
    if wanted is not None and wanted not in host.cuda:
        have = ", ".join(f"sm_{a}{b}" for a, b in host.cuda)
        return f"it holds code for sm_{wanted[0]}{wanted[1]} and this machine has {have}"
    return ""


def _wanted_capability(arch: str) -> tuple[int, int] | None:
    digits = "".join(c for c in str(arch).removeprefix("sm_") if c.isdigit())
    return (int(digits[:-1]), int(digits[-1])) if len(digits) >= 2 else None
