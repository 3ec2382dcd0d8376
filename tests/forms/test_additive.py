"""additive: the paper's formulas, hidden tokens as if absent, the kernel with masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from passes.form import Reason, form_named
from passes.site import AttentionSite
from tests.by_hand import site
from tests.targets.kit_tools import Case, trial

T, D = 7, 4


def inputs(where: AttentionSite) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    d = where.dims
    form = form_named("additive")
    params = {n: torch.randn_like(p).double() for n, p in form.init_params(where).items()}
    shapes = ((d.B, d.H, d.T, d.D), (d.B, d.G, d.S, d.D), (d.B, d.G, d.S, d.E))
    return params, [torch.randn(*s, dtype=torch.float64) for s in shapes]


def test_it_is_the_formula() -> None:
    where = site(B=1, H=2, G=1, T=T, D=D)
    form = form_named("additive")
    params, (q, k, v) = inputs(where)
    got = form.attend(form.spec(where), params, q, k, v)
    for h in range(2):
        rows, keys, values = q[0, h], k[0, 0], v[0, 0]
        alpha = (D**-0.5 * rows @ params["w_q"][h]).softmax(0)
        g_q = (alpha[:, None] * rows).sum(0)
        p = g_q * keys
        beta = (D**-0.5 * p @ params["w_k"][h]).softmax(0)
        g_k = (beta[:, None] * p).sum(0)
        want = rows + (g_k * values) @ params["mix"][h]
        torch.testing.assert_close(got[0, h], want, rtol=1e-12, atol=1e-12)


def test_hidden_tokens_could_as_well_be_absent() -> None:
    where = site(B=1, T=T, D=D, padding=True)
    form = form_named("additive")
    params, (q, k, v) = inputs(where)
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[:, 4:] = False
    short = [x[:, :, :4] for x in (q, k, v)]
    want = form.attend(form.spec(where), params, *short)
    wild = [torch.where(mask[:, None, :, None], x, 1e9 * torch.randn_like(x)) for x in (q, k, v)]
    got = form.attend(form.spec(where), params, *wild, mask)
    torch.testing.assert_close(got[:, :, :4], want, rtol=1e-12, atol=1e-12)
    none = form.attend(form.spec(where), params, q, k, v, torch.zeros_like(mask))
    assert (none == 0).all()


@pytest.mark.parametrize("padding", [False, True])
def test_gradients(padding: bool) -> None:
    where = site(B=2, H=2, G=1, T=4, D=3, padding=padding)
    form = form_named("additive")
    params, tensors = inputs(where)
    mask = torch.tensor([[True, True, False, True], [False] * 4]) if padding else None
    names = sorted(params)
    given = [x.requires_grad_() for x in (*tensors, *(params[n] for n in names))]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        named = dict(zip(names, rest, strict=True))
        return form.attend(form.spec(where), named, q, k, v, mask)

    assert torch.autograd.gradcheck(run, given)


def test_weights_are_the_shares_of_the_pooled_key() -> None:
    where = site(T=T, D=D, padding=True)
    form = form_named("additive")
    params, (q, k, _) = inputs(where)
    mask = torch.rand(2, T) < 0.6
    mask[:, 0] = True
    weights = form.weights(form.spec(where), params, q, k, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, T).double())
    assert (weights.masked_select(~mask[:, None, None].expand_as(weights)) == 0).all()


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_kernel_and_its_count_under_masks(rows: int, dtype: str) -> None:
    case = Case(B=2, H=4, G=2, T=21, S=21, D=24, E=24, key_rows=rows, dtype=dtype)
    t = trial("additive", case, np.random.default_rng())
    if rows == 2:
        t.arrays["key_mask"][1] = False
    built = t.build()
    near = 2e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(t.run(built), t.reference(), atol=near, rtol=0)
    if dtype == "float32":
        want = t.form.ops(case.site)
        assert {(o, d): n for o, d, n in built.ops} == {(o, d): n for o, d, n in want}


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (site(causal=True), Reason.MASK_CAUSAL),
        (site(bias=True), Reason.MASK_BIAS),
        (site(window=(1, 1)), Reason.MASK_WINDOW),
        (site(T=3, S=5), Reason.CROSS),
        (replace(site(), cross=True), Reason.CROSS),
        (site(D=8, E=4), Reason.HEAD_DIM),
    ],
)
def test_refusals(where: AttentionSite, reason: Reason) -> None:
    verdict = form_named("additive").applies(where)
    assert not verdict
    assert verdict.reason is reason
