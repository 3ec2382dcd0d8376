"""The per-kernel profile: every kernel is there, its numbers hang together, no torch is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from codegen.profile import MACHINE, flops_of, profile
from codegen.runtime import Artifact, load
from passes.errors import InputError, UsageError
from passes.opcount import OpCount
from rewriter.api import compile as compile_artifact
from rewriter.bench import random_inputs
from tests.bench_models import small


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("profile") / "small.rwa"
    model, inputs = small()
    compile_artifact(model, inputs, path=made, form="exact", on_noop="ok")
    return made


@pytest.fixture
def artifact(path: Path) -> Artifact:
    return load(path, threads=1)


def test_every_kernel_of_the_report_is_timed(artifact: Artifact) -> None:
    made = profile(artifact, random_inputs(artifact.inputs), 0.05)
    rows = {row.name: row for row in made.kernels}
    known = {k["name"]: k for k in artifact.report["kernels"]}
    assert set(known) <= set(rows) <= {*known, MACHINE}
    for name, kernel in known.items():
        assert rows[name].calls == kernel["calls"]
        assert rows[name].rule == kernel["scheduled_by"]
        assert rows[name].ms > 0
        if kernel["ops"] and flops_of(kernel["ops"]):
            want = kernel["calls"] * flops_of(kernel["ops"]) / rows[name].ms / 1e6
            assert rows[name].gflops == pytest.approx(want)
    assert [r.ms for r in made.kernels] == sorted((r.ms for r in made.kernels), reverse=True)
    assert sum(r.share for r in made.kernels) == pytest.approx(1)
    assert made.runs >= 3
    assert json.loads(json.dumps(made.to_json()))["kernels"][0]["name"] == made.kernels[0].name


def test_the_artifact_still_runs_without_the_instrument(artifact: Artifact) -> None:
    inputs = random_inputs(artifact.inputs)
    before = artifact.run(inputs)
    profile(artifact, inputs, 0.01)
    after = artifact.run(inputs)
    assert all((before[name] == after[name]).all() for name in before)


def test_wrong_inputs_and_seconds_are_refused(artifact: Artifact) -> None:
    inputs = random_inputs(artifact.inputs)
    with pytest.raises(UsageError, match="seconds"):
        profile(artifact, inputs, 0.0)
    with pytest.raises(InputError):
        profile(artifact, {}, 0.1)


def test_only_floating_arithmetic_counts() -> None:
    ops = OpCount({("mul", "float32"): 5, ("add", "int64"): 7, ("exp", "float32"): 3}, 8, 8)
    assert flops_of(ops.to_json()) == 5


def test_the_verb_needs_an_artifact_and_no_torch(path: Path) -> None:
    code = (
        "import sys\n"
        "from rewriter.cli import run\n"
        f"code = run(['bench', {str(path)!r}, '--profile', '--seconds', '0.05', '--json'])\n"
        "print('torch' in sys.modules, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("False")
    assert json.loads(done.stdout)["kernels"]
    wrong = [sys.executable, "-m", "rewriter", "bench", "minilm", "--profile"]
    refused = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "is not an artifact" in refused.stderr
