"""Cores a process may use; artifacts with their own threads beside torch's pool."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from codegen import cores
from codegen.cores import cgroup_quota
from passes.errors import UsageError
from rewriter.api import compile as compile_artifact
from rewriter.api import load


def groups(root: Path, listing: str, files: dict[str, str]) -> tuple[Path, Path]:
    mount, told = root / "mount", root / "cgroup"
    told.write_text(listing)
    for name, text in files.items():
        path = mount / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return mount, told


@pytest.mark.parametrize(
    ("listing", "files", "want"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ("0::/a\n", {"a/cpu.max": "400000 100000", "cpu.max": "300000 100000"}, 3.0),
        (
            "4:memory:/x\n3:cpu,cpuacct:/d\n",
            {
                "cpu,cpuacct/d/cpu.cfs_quota_us": "200000\n",
                "cpu,cpuacct/d/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            "1:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("garbage", {}, None),
    ],
)
def test_quotas_of_control_groups(
    tmp_path: Path, listing: str, files: dict[str, str], want: float | None
) -> None:
    assert cgroup_quota(*groups(tmp_path, listing, files)) == want


@pytest.mark.parametrize("quota", [None, 0.2, 1.0, 1.5, 1000.0])
def test_the_quota_limits_the_affinity(
    quota: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "cgroup_quota", lambda: quota)
    allowed = len(os.sched_getaffinity(0))
    assert cores.usable_cores() == min(allowed, math.ceil(1000.0 if quota is None else quota))


def test_a_narrowed_process_uses_what_it_may() -> None:
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}})\n"
        "from codegen.target import usable_cores; print(usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, 128), nn.Linear(128, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.two(torch.relu(self.one(x)))


def test_two_artifacts_beside_torch_keep_their_threads_and_torch_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {n: Net(width).eval() for n, width in ((1, 48), (2, 64))}
    inputs = {n: torch.randn(1, 40, m.one.in_features) for n, m in models.items()}
    made = {}
    for n, model in models.items():
        path = tmp_path / f"{n}.rwa"
        compile_artifact(model, (inputs[n],), path=path, on_noop="ok", threads=n)
        # Set by the compiler where the user did not; it goes before an artifact's own number.
        monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
        made[n] = load(path)  # the number compiled for is the default
    before, allowed = torch.get_num_threads(), os.sched_getaffinity(0)
    for _ in range(3):
        for n, artifact in made.items():
            with torch.no_grad():
                want = models[n](inputs[n]).numpy()
            got = next(iter(artifact(inputs[n].numpy()).values()))
            np.testing.assert_allclose(got, want, atol=1e-5)
    assert [a.threads for a in made.values()] == [1, min(2, cores.usable_cores())]
    assert torch.get_num_threads() == before
    assert os.sched_getaffinity(0) == allowed


def test_compile_refuses_threads_that_are_no_number(tmp_path: Path) -> None:
    for threads in (0, -1, True, 1.5):
        with pytest.raises(UsageError, match="threads"):
            compile_artifact(
                Net(8), (torch.randn(1, 4, 8),), path=tmp_path / "x", on_noop="ok",
                threads=threads,  # type: ignore[arg-type]
            )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
