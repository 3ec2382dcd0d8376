"""Layers of two experts on a board: cross-compiled, run under qemu-user, equal to the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from codegen.edge.board import Board, missing
from passes.linears import linear_modules
from rewriter import compile, rewrite
from rewriter.verify import flat_tensors
from tests.cli_factories import encoder

pytestmark = [pytest.mark.cross, pytest.mark.skipif(bool(missing()), reason=missing() or "here")]


@pytest.mark.slow
def test_the_board_computes_what_the_model_does(tmp_path: Path) -> None:
    model, inputs = encoder()
    linear = "moe:latencies=1/1,*linear1"
    result = rewrite(model, inputs, linear=linear, target="edge:cortex-a72")
    layer = linear_modules(result.model)["layers.0.linear1"]
    with torch.no_grad():  # experts that differ by more than rounding
        layer.params["multiply"].mul_(1.5)
    compile(result, path=tmp_path / "edge.rwa", target="edge:cortex-a72")
    outputs = Board.qemu(tmp_path).run(
        tmp_path / "edge.rwa", {n: t.numpy() for n, t in inputs.items()}
    )
    with torch.no_grad():
        wanted = flat_tensors(result.model(**inputs))
    np.testing.assert_allclose(next(iter(outputs.values())), wanted[0], rtol=1e-3, atol=1e-4)
