"""block_summary: all blocks give softmax, so do equal keys in a block; masks; its kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from passes.errors import FormError, UsageError
from passes.form import Reason, form_named
from passes.forms.block_summary import BlockSummary
from tests.by_hand import site
from tests.targets.kit_tools import Case, Trial, trial


def made(block: int, best: int) -> BlockSummary:
    return BlockSummary({"block": block, "best": best})


def inputs(tokens: int = 22) -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 4, tokens, 6).double()
    return q, torch.randn(2, 2, tokens, 6).double(), torch.randn(2, 2, tokens, 5).double()


def exact(at: Any, *tensors: Any) -> torch.Tensor:
    form = form_named("exact")
    return form.attend(form.spec(at), {}, *tensors)


@pytest.mark.parametrize("padding", [False, True])
def test_all_blocks_are_softmax(padding: bool) -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=22, D=6, E=5, padding=padding)
    mask = torch.rand(2, 22) > 0.4 if padding else None
    form = made(4, 5)
    assert form.dense(22)
    want = exact(at, q, k, v, mask)
    torch.testing.assert_close(form.attend(form.spec(at), {}, q, k, v, mask), want)
    through_blocks = form._weights(form.spec(at), q, k, mask) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(through_blocks, want, rtol=0, atol=1e-12)


def test_equal_keys_and_values_of_a_block_are_softmax() -> None:
    q, k, v = inputs()
    at = site(H=4, G=2, T=22, D=6, E=5, padding=True)
    block = torch.arange(22) // 5
    k, v = k[:, :, block], v[:, :, block]
    mask = torch.rand(2, 22) > 0.4
    mask[0, 5:10] = False  # a block without any key
    for form in (made(5, 0), made(5, 2)):
        assert not form.dense(22)
        for hidden in (None, mask):
            got = form.attend(form.spec(at), {}, q, k, v, hidden)
            torch.testing.assert_close(got, exact(at, q, k, v, hidden), rtol=0, atol=1e-12)


def test_formula_of_one_query() -> None:
    q, k, v = inputs(20)
    at, form = site(H=4, G=2, T=20, D=6, E=5), made(4, 1)
    got = form.attend(form.spec(at), {}, q, k, v)
    b, h, i = 1, 3, 9  # of block 2
    keys, values = k[b, 1].reshape(5, 4, 6), v[b, 1].reshape(5, 4, 5)
    mean = q[b, h, 8:12].mean(0)
    score = keys.mean(1) @ mean
    score[2] = -torch.inf
    near = {2, int(score.argmax())}
    top, bottom = torch.zeros(5).double(), torch.zeros(()).double()
    for n in range(5):
        if n in near:
            e = (keys[n] @ q[b, h, i] * at.scale).exp()
            top, bottom = top + e @ values[n], bottom + e.sum()
        else:
            e = 4 * (keys[n].mean(0) @ q[b, h, i] * at.scale).exp()
            top, bottom = top + e * values[n].mean(0), bottom + e
    torch.testing.assert_close(got[b, h, i], top / bottom, rtol=0, atol=1e-12)


def test_error_falls_with_the_blocks_and_the_size_of_a_block() -> None:
    steps = torch.randn(16, 2, 96, 8).double().cumsum(2) / 4
    q, k, v = (steps + 0.3 * torch.randn(16, 2, 96, 8).double() for _ in range(3))
    at = site(B=16, H=2, T=96, D=8)
    want = exact(at, q, k, v)

    def error(block: int, best: int) -> float:
        form = made(block, best)
        return float((form.attend(form.spec(at), {}, q, k, v) - want).norm() / want.norm())

    assert error(8, 0) > error(8, 3) > error(8, 9)
    assert error(32, 0) > error(4, 0)


def test_rows_sum_to_one_and_hidden_keys_count_nothing() -> None:
    q, k, v = inputs()
    at, form = site(H=4, G=2, T=22, D=6, E=5, padding=True), made(3, 2)
    mask = torch.rand(2, 22) > 0.5
    mask[:, 0] = True
    weights = form.weights(form.spec(at), {}, q, k, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 22).double())
    assert (weights * ~mask[:, None, None] == 0).all()
    assert (weights.masked_fill(~mask[:, None, None], 1.0) > 0).all()
    hidden = ~mask[:, None, :, None]
    far = [torch.where(hidden, 1e9 * torch.randn_like(x), x) for x in (k, v)]
    torch.testing.assert_close(
        form.attend(form.spec(at), {}, q, *far, mask), form.attend(form.spec(at), {}, q, k, v, mask)
    )
    mask[1] = False
    assert (form.attend(form.spec(at), {}, q, k, v, mask)[1] == 0).all()


CASES = [
    (Case(B=2, H=4, G=2, T=45, S=45, D=16, E=20, key_rows=2), 8, 2),
    (Case(T=64, S=64, D=24, E=8), 16, 1),
    (Case(T=37, S=37, D=8, E=8, dtype="float16"), 8, 1),
]


@pytest.mark.parametrize(("case", "block", "best"), CASES, ids=str)
def test_kernels(case: Case, block: int, best: int) -> None:
    form, wide = made(block, best), case.dtype == "float32"
    while True:
        arrays = trial("exact", case, np.random.default_rng()).arrays
        if case.key_rows:
            arrays["key_mask"][1, 8:24] = False  # two blocks without any key
        q, k = (torch.from_numpy(arrays[n]).double() for n in "qk")
        mask = torch.from_numpy(arrays["key_mask"]) if case.key_rows else None
        if form.margin(form.spec(case.site), {}, q, k, mask) > (1e-5 if wide else 1e-3):
            break
    t = Trial(form, case, arrays, {})
    built = t.build()
    np.testing.assert_allclose(t.run(built), t.reference(), atol=2e-5 if wide else 4e-3, rtol=0)
    if wide:
        assert dict(built.ops.ops) == dict(form.ops(case.site).ops)


def test_fewer_blocks_with_keys_than_places() -> None:
    case = Case(T=48, S=48, D=8, E=8, key_rows=1)
    t = Trial(made(8, 3), case, trial("exact", case, np.random.default_rng()).arrays, {})
    t.arrays["key_mask"][:] = False
    t.arrays["key_mask"][:, 3:9] = True  # blocks 0 and 1
    np.testing.assert_allclose(t.run(), t.reference(), atol=2e-5, rtol=0)
    t.arrays["key_mask"][:] = False
    assert (t.run() == 0).all()


def test_refusals_and_errors() -> None:
    form, at = form_named("block_summary"), site(padding=True, H=4, G=2)
    assert form.applies(at)
    assert form.applies(replace(at, cross=True)).reason is Reason.CROSS
    assert form.applies(site(T=4, S=5)).reason is Reason.CROSS
    assert form.applies(site(causal=True)).reason is Reason.MASK_CAUSAL
    assert form.applies(site(bias=True)).reason is Reason.MASK_BIAS
    with pytest.raises(FormError, match="3 queries and 4 keys"):
        form.attend(form.spec(at), {}, *(torch.randn(1, 4, n, 8) for n in (3, 4, 4)))
    for config in ({"block": 0}, {"best": -1}):
        with pytest.raises(UsageError, match=next(iter(config))):
            form_named("block_summary", config)
