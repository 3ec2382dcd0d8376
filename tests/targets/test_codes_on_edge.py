"""Attention over codes and coded linear layers on edge:cortex-a72: cross-compiled, run under
qemu-user, equal to the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from codegen.edge.board import Board, missing
from rewriter import compile
from tests.targets.test_codes_on_gpu import WAYS, rewritten

pytestmark = [pytest.mark.cross, pytest.mark.skipif(bool(missing()), reason=missing() or "here")]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    return Board.qemu(tmp_path_factory.mktemp("board"))


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, "shift:activations=integer"])
def test_the_board_computes_what_the_model_does(board: Board, way: str, tmp_path: Path) -> None:
    result, inputs = rewritten(way)
    path = tmp_path / "edge.rwa"
    made = compile(result, path=path, target="edge:cortex-a72")
    assert all(k["scheduled_by"] for k in made.report["kernels"])
    (have,) = board.run(path, {"x": inputs["x"].numpy()}).values()
    with torch.no_grad():
        np.testing.assert_allclose(have, result.model(**inputs), rtol=1e-4, atol=2e-5)
