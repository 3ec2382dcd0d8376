"""shiftadd: the released formula one number at a time, both quantisers, counts of the paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from passes.errors import UsageError
from passes.form import Reason
from passes.forms.shiftadd import ShiftAdd
from passes.rewire import ALL_TOKENS, SHARED
from tests.by_hand import site


def made(options: dict[str, Any], **facts: Any) -> tuple[Any, ...]:
    at = site(**facts)
    form, d = ShiftAdd(options), at.dims
    shapes = ((d.B, d.H, d.T, d.D), (d.B, d.G, d.S, d.D), (d.B, d.G, d.S, d.E))
    q, k, v = (torch.randn(*s).double() for s in shapes)  # type: ignore[arg-type]
    params = {n: p.double() for n, p in form.init_params(at).items()}
    params["conv"] = torch.randn(d.G, 9).double()
    return form, at, params, q, k, v


@pytest.mark.parametrize("quantiser", ["hash", "sign"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_released_formula(quantiser: str, padded: bool) -> None:
    form, at, params, q, k, v = made({"quantiser": quantiser}, T=13, H=4, G=2, D=6, E=5)
    mask = torch.ones(2, 13, dtype=torch.bool)
    if padded:
        mask[0, 9:] = False
        mask[1, :2] = False
    out = form.attend(form.spec(at), params, q, k, v, mask if padded else None)
    cq, ck = form.codes(q, params), form.codes(k, params)
    assert set(cq.unique().tolist()) <= {0.0, 1.0}
    for b, h, i in ((0, 0, 0), (1, 3, 12), (0, 2, 6), (1, 1, 8)):
        g = h // 2
        values = [v[b, g, j] if mask[b, j] else torch.zeros(5).double() for j in range(13)]
        y = values[i] / 2
        for j in range(13):
            agree = sum(float(x * z) for x, z in zip(cq[b, h, i], ck[b, g, j], strict=True))
            y = y + agree / math.pi * values[j]
        want: Tensor = y / y.norm()
        for t in range(9):
            if 0 <= i + t - 4 < 13:
                want = want + params["conv"][g, t] * values[i + t - 4]
        torch.testing.assert_close(out[b, h, i], want)


def test_sign_codes_compare_with_a_frozen_threshold() -> None:
    form, at, params, q, k, _ = made({"quantiser": "sign"}, T=6, H=2)
    learned = form.learn(at, params, [(q, k, None), (k, q, None)])
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (q, k)]
    want = torch.stack([torch.cat([x[:, g] for x in unit]).mean() for g in range(2)])
    torch.testing.assert_close(learned["threshold"], want)
    params |= learned
    codes = form.codes(q, params)
    assert codes.shape[-1] == 8  # one bit a channel
    assert torch.equal(codes, (unit[0] > want[None, :, None, None]).double())
    assert torch.equal(form.codes(q[:1], params), codes[:1])  # not of the batch


def test_what_trains_and_what_is_frozen() -> None:
    from passes.substitute import AttentionModule

    module = AttentionModule(site(), ShiftAdd())
    assert {n for n, p in module.params.items() if p.requires_grad} == {"conv"}


@pytest.mark.parametrize(
    ("facts", "reason"),
    [({"causal": True}, Reason.MASK_CAUSAL), ({"T": 4, "S": 6}, Reason.CROSS)],
)
def test_refusals(facts: dict[str, Any], reason: Reason) -> None:
    assert ShiftAdd().applies(site(**facts)).reason is reason


@pytest.mark.parametrize("bad", [{"quantiser": "round"}, {"bits": 0}, {"anchors": -1}])
def test_bad_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ShiftAdd(bad)


def test_rewires() -> None:
    from dataclasses import replace

    at = replace(site(T=16, S=4), reduced=True)
    assert ShiftAdd().rewires(at) == (ALL_TOKENS, SHARED)
    assert ShiftAdd({"quantiser": "sign"}).rewires(at) == (ALL_TOKENS,)
