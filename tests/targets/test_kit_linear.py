"""Linear attention and feature maps through the kit, against float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tvm import tirx
from tvm.s_tir import SBlock

from tests.targets.kit_tools import Case, trial, with_target

CASES = [
    Case(),
    Case(T=1, S=1, D=3, E=2),
    Case(T=1, S=70, D=40, E=16),
    Case(B=2, T=17, S=50, D=80, E=24, H=4, G=2, key_rows=2),
    Case(T=30, S=600, H=1, G=1, E=40, key_rows=1),
    Case(T=9, S=100, D=128, E=64, H=3, G=1),
    Case(T=150, S=150, causal=True, H=4),
    Case(T=64, S=64, causal=True, D=16, E=7),
    Case(T=5, S=37, causal=True, D=5, E=20),
    Case(T=70, S=200, causal=True, key_rows=1),
    Case(T=37, S=5, causal=True),
    Case(T=1, S=1, causal=True),
    Case(T=70, S=300, H=1, G=1),  # the keys of a head in pieces
    Case(B=2, T=5, S=300, H=2, G=1, causal=True, key_rows=2),  # older keys in pieces
    Case(T=200, S=200, H=3, G=1, causal=True),  # the chunks of a head in pieces
]


# hedgehog adds the projection and the softmax pair; the rest is the same code.
PAIRS = [("elu", c) for c in CASES]
PAIRS += [("hedgehog", c) for c in CASES[1:2] + CASES[3:4] + CASES[9:10] + CASES[12:]]


@pytest.mark.parametrize(("name", "case"), PAIRS, ids=str)
def test_equals_float64(name: str, case: Case) -> None:
    t = trial(name, case, np.random.default_rng())
    built = t.build()
    assert [k.scheduled_by for k in built.kernels] == ["linear_attention_fused"]
    np.testing.assert_allclose(t.run(built), t.reference(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_see_no_key_are_zero(causal: bool) -> None:
    t = trial("elu", Case(B=2, key_rows=2, causal=causal), np.random.default_rng())
    t.arrays["key_mask"][1] = False
    y = t.run()
    assert np.all(y[1] == 0)
    assert np.isfinite(y).all()


@pytest.mark.parametrize(("name", "causal"), [("elu", False), ("hedgehog", True)])
def test_nan_reaches_the_rows_it_concerns(name: str, causal: bool) -> None:
    t = trial(name, Case(T=80, S=80, causal=causal), np.random.default_rng())
    t.arrays["q"][0, 1, 7, 3] = np.nan
    bad = np.isnan(t.run())
    assert bad[0, 1, 7].all()
    assert bad.sum() == bad[0, 1, 7].size
    t.arrays["q"][0, 1, 7, 3] = 0
    t.arrays["k"][0, 0, 70, 0] = np.nan
    bad = np.isnan(t.run())
    assert bad[0, 0, 72:].all()
    assert not bad[0, 1].any()


def test_future_keys_do_not_leak() -> None:
    t = trial("hedgehog", Case(T=100, S=100, causal=True), np.random.default_rng())
    built = t.build()
    before = t.run(built)
    t.arrays["k"][:, :, 70:], t.arrays["v"][:, :, 70:] = 9.0, -1e3
    after = t.run(built)
    np.testing.assert_array_equal(before[:, :, :70], after[:, :, :70])
    assert np.abs(before[:, :, 70:] - after[:, :, 70:]).max() > 1


@pytest.mark.parametrize("causal", [False, True])
def test_large_and_nan_logits_keep_to_their_rows(causal: bool) -> None:
    """A row beyond the range of plain exponentials is done again, its neighbours are not."""
    t = trial("hedgehog", Case(T=40, S=40, causal=causal), np.random.default_rng())
    t.arrays["q"][0, 0, 5] *= 150.0
    t.arrays["k"][0, 0, 9] *= -150.0
    built = t.build()
    # Logits of some hundreds are rounded to 1e-5, so features to as much.
    np.testing.assert_allclose(t.run(built), t.reference(), atol=2e-4, rtol=0)
    t.arrays["q"][0, 0, 6] = np.nan
    got, want = t.run(built), t.reference()
    assert np.isnan(got[0, 0, 6]).all()
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "causal"), [("elu", True), ("hedgehog", False)])
def test_nothing_of_a_hidden_key_gets_through(name: str, causal: bool) -> None:
    case = Case(B=2, T=60, S=60, key_rows=2, causal=causal)
    t = trial(name, case, np.random.default_rng())
    want = t.reference()
    hidden = ~t.arrays["key_mask"]
    for tensor in "kv":
        t.arrays[tensor].transpose(0, 2, 1, 3)[hidden] = np.nan
    np.testing.assert_allclose(t.run(), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("name", "causal"), [("elu", True), ("hedgehog", False)])
def test_float16_data_has_float32_sums(name: str, causal: bool) -> None:
    case = Case(T=70, S=70, H=4, causal=causal, key_rows=1, dtype="float16")
    t = trial(name, case, np.random.default_rng())
    y = t.run()
    assert y.dtype == np.float16
    want = t.reference()
    np.testing.assert_allclose(y, want, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "causal"), [("elu", False), ("hedgehog", True)])
def test_scratch_does_not_grow_with_tokens(name: str, causal: bool) -> None:
    def scratch(tokens: int) -> int:
        case = Case(T=tokens, S=tokens, H=3, G=3, causal=causal)
        t = trial(name, case, np.random.default_rng())
        (func,) = t.build().scheduled.values()
        return sum(math.prod(int(n) for n in b.shape) for b in buffers_of(func.body))

    short, long = scratch(1024), scratch(8192)
    assert short > 0
    assert long <= 1.5 * short
    assert long < 8192 * 3 * 32  # one tensor of a site of this length


def test_few_vector_registers() -> None:
    """The schedule of an AVX2 machine, run here."""
    t = trial("hedgehog", Case(T=27, S=27, E=20, causal=True), np.random.default_rng())
    t = with_target(t, vector_bytes=32, vector_registers=16)
    np.testing.assert_allclose(t.run(), t.reference(), atol=2e-5, rtol=0)


def buffers_of(node: Any) -> list[Any]:
    """All buffers that a statement of a scheduled kernel allocates."""
    found = list(node.alloc_buffers) if isinstance(node, SBlock) else []
    parts = [getattr(node, name, None) for name in ("block", "body", "then_case", "else_case")]
    for part in [*parts, *(node if isinstance(node, tirx.SeqStmt) else ())]:
        found += [] if part is None else buffers_of(part)
    return found
