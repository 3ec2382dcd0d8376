"""Kernels of linear-angular attention: both quantisers, odd sizes, and no product with a code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from passes.form import form_named
from tests.targets.kit_tools import Case, Trial, trial
from tests.targets.test_kit_hamming import is_constant, products


def made(case: Case, **options: Any) -> Trial:
    rng = np.random.default_rng()
    form = form_named("shiftadd", options)
    while True:
        params = {n: p.numpy() for n, p in form.init_params(case.site).items()}
        params["conv"] = rng.normal(size=params["conv"].shape).astype("float32")
        t = Trial(form, case, trial("shiftadd", case, rng).arrays, params)
        wide = {n: torch.from_numpy(p).double() for n, p in params.items()}
        q, k = (torch.from_numpy(t.arrays[n]).double() for n in "qk")
        if form.margin(t.spec, wide, q, k) > 1e-6:
            return t


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(T=300, S=300, D=20, E=24), {}),
        (Case(B=2, T=21, S=21, H=6, G=2, key_rows=2), {"bits": 34, "anchors": 6}),
        (Case(T=19, S=19, D=40, E=24, key_rows=1), {"quantiser": "sign"}),
        (Case(B=2, T=5, S=5, D=16, H=4, G=2), {"quantiser": "sign"}),
    ],
    ids=str,
)
def test_kernel_equals_module_and_counts(case: Case, options: dict[str, Any]) -> None:
    t = made(case, **options)
    built = t.build()
    np.testing.assert_allclose(t.run(built), t.reference(), atol=5e-5, rtol=0)
    mine, closed = ({(o, d): n for o, d, n in c} for c in (built.ops, t.form.ops(case.site)))
    assert mine == closed


def test_codes_multiply_nothing() -> None:
    """Products of two loaded floats: the convolution's taps, the squares, the length; no code."""
    t = made(Case(T=40, S=40), bits=8)
    built = t.build()
    func = built.scheduled[next(n for n in built.scheduled if n.startswith("angular"))]
    assert [str(p.dtype) for p in func.params][:2] == ["uint32", "uint32"]
    free = [m for m in products(func) if not (is_constant(m.a) or is_constant(m.b))]
    # sums and counts by code are buckets: none of them is a factor
    names = {str(x.buffer.name) for m in free for x in (m.a, m.b) if hasattr(x, "buffer")}
    tables = {str(b.name) for b in _buffers(func) if len(b.shape) == 5}
    assert tables
    assert not names & tables


def _buffers(func: Any) -> list[Any]:
    from tests.targets.test_kit_hamming import walk

    return [b for n in walk(func.body) for b in getattr(n, "alloc_buffers", None) or ()]
