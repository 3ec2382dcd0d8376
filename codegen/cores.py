"""How many cores this process may use: its affinity, and the quota of its control groups."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_MOUNT, _SELF = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores by affinity, and no more than the quota of a container pays for; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cgroup_quota()
    cores = allowed or 1
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cgroup_quota(mount: Path = _MOUNT, listing: Path = _SELF) -> float | None:
    """Cores' worth of time per period that the tightest control group grants; None: no limit.

    Reads cpu.max (version 2) and cpu.cfs_quota_us (version 1) of the group and those above it.
    """
    shares = [share for folder in _folders(mount, listing) for share in _share(folder)]
    return min(shares, default=None)


def _folders(mount: Path, listing: Path) -> Iterator[Path]:
    try:
        lines = listing.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / controllers if controllers else mount
        inside = path.strip("/")
        parts = inside.split("/") if inside else []
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth])
            if controllers:  # version 1 is mounted under its whole name or under one of them
                yield (mount / "cpu").joinpath(*parts[:depth])


def _share(folder: Path) -> Iterator[float]:
    for quota, period in (_words(folder / "cpu.max"), _halves(folder)):
        if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:
            yield int(quota) / int(period)


def _words(path: Path) -> tuple[str, str]:
    parts = _text(path).split()
    return (parts[0], parts[1]) if len(parts) == 2 else ("", "")


def _halves(folder: Path) -> tuple[str, str]:
    return _text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
