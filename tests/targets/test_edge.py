"""edge:cortex-a72: cross-compiled here, run under qemu-user, equal to the host within tolerance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from codegen.archive import describe
from codegen.edge.board import Board, missing
from codegen.target import target_named
from passes.errors import ArtifactError
from rewriter import compile, load
from rewriter.verify import flat_tensors
from tests.cli_factories import encoder

pytestmark = [pytest.mark.cross, pytest.mark.skipif(bool(missing()), reason=missing() or "here")]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    return Board.qemu(tmp_path_factory.mktemp("board"))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["exact", "elu", "hedgehog"])
def test_the_board_computes_what_the_model_does(board: Board, form: str, tmp_path: Path) -> None:
    model, inputs = encoder()
    path = tmp_path / "edge.rwa"
    compile(model, inputs, path=path, form=form, target="edge:cortex-a72")
    arrays = {n: t.numpy() for n, t in inputs.items()}
    outputs = board.run(path, arrays)

    host = tmp_path / "host.rwa"
    compile(model, inputs, path=host, form=form, target="cpu")
    with load(host) as artifact:
        wanted = artifact.run(arrays)
    assert list(outputs) == list(wanted)
    for name, array in outputs.items():
        np.testing.assert_allclose(array, wanted[name], rtol=1e-4, atol=1e-5)
    if form == "exact":
        with torch.no_grad():
            eager = flat_tensors(model(**inputs))
        np.testing.assert_allclose(next(iter(outputs.values())), eager[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_an_edge_artifact_is_refused_on_this_machine(tmp_path: Path) -> None:
    model, inputs = encoder()
    path = tmp_path / "edge.rwa"
    described = compile(model, inputs, path=path, form="elu", target="edge:cortex-a72")
    assert described.manifest.target["name"] == "edge:cortex-a72"
    assert "not run here" in " ".join(described.report["notes"])
    assert all(k["scheduled_by"] for k in described.report["kernels"])
    with pytest.raises(ArtifactError, match="edge:cortex-a72"):
        described.run({n: t.numpy() for n, t in inputs.items()})
    with pytest.raises(ArtifactError, match="aarch64"):
        load(path)
    assert describe(path).features == target_named("edge:cortex-a72").features
