"""Verifying a model with codes: a bit at its threshold may differ, a wrong kernel may not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from passes.plan import plan_by_rules
from passes.substitute import substitute
from rewriter.verify import jumps, verify_artifact
from tests.by_hand import Encoder, canonical


class Shifted:
    """An artifact that is the model itself, off by `amount` times normal noise."""

    def __init__(self, module: Any, amount: float) -> None:
        self.module, self.amount = module, amount
        self.inputs = (SimpleNamespace(name="x", dtype="float32"),)

    def run(self, arrays: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            out = self.module(x=torch.from_numpy(arrays["x"])).numpy()
        noise = np.random.default_rng().normal(size=out.shape).astype(out.dtype)
        return {"out": out + self.amount * noise}


@pytest.mark.parametrize(
    ("form", "amount", "ok"),
    [
        ("hamming", 1e-7, True),
        ("hamming", 2e-3, True),  # as after a flipped bit
        ("hamming", 0.2, False),
        ("shiftadd", 2e-3, True),
        ("elu", 2e-3, False),
        ("exact", 2e-3, False),
    ],
)
def test_tolerance_of_codes(form: str, amount: float, ok: bool) -> None:
    x = torch.randn(2, 9, 16)
    traced, sites = canonical(Encoder().eval(), {"x": x})
    module = substitute(traced, sites, plan_by_rules(sites, {"*": form})).module
    assert jumps(module) == (form in ("hamming", "shiftadd"))
    stats = verify_artifact(Shifted(module, amount), module, {"x": x})
    assert stats.ok is ok
    assert stats.dtype == "float32"
    assert stats.rms_tolerance == (1e-5 if amount < 1e-6 or not jumps(module) else 3e-2)
