"""Forms whose kernels stand between operators of their own, compiled inside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from passes.form import form_named
from rewriter import compile, rewrite
from tests.by_hand import Encoder

FORMS: list[tuple[str, dict[str, Any], bool]] = [
    ("galerkin", {}, False),
    ("norm_linear", {}, True),
    ("diag_block", {"block": 16}, False),
]


@pytest.mark.parametrize(("name", "config", "causal"), FORMS, ids=lambda x: str(x))
def test_artifact_equals_model(
    name: str, config: dict[str, Any], causal: bool, tmp_path: Path
) -> None:
    """Padding and grouped heads, or causal; 37 tokens fill no block and no vector."""
    model = Encoder(width=32, heads=4, groups=4 if causal else 2, causal=causal).eval()
    inputs = {"x": torch.randn(2, 37, 32)}
    if not causal:
        inputs["mask"] = torch.arange(37) < torch.tensor([[37], [21]])
    result = rewrite(model, inputs, form=name)
    for site in result.rewritten.sites:
        result.rewritten.put(site.id, form_named(name, config))
    result.plan = result.rewritten.plan
    artifact = compile(result, path=tmp_path / "model.rwa")
    with torch.no_grad():
        want = result.model(**inputs)
    got = artifact(**{n: x.numpy() for n, x in inputs.items()})
    np.testing.assert_allclose(_first(got), _first(want).numpy(), atol=2e-5, rtol=0)


def _first(outputs: Any) -> Any:
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    return outputs[0] if isinstance(outputs, list | tuple) else outputs
