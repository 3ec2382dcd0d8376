"""Projections of the same tokens are one product, read in parts without a copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from passes.canonicalise import canonicalise
from passes.find import find
from passes.plan import plan_by_rules
from passes.seal import seal
from passes.substitute import substitute
from passes.trace import trace
from tests.targets.lowering import lowered, run


def heads(x: torch.Tensor, number: int) -> torch.Tensor:
    return x.view(*x.shape[:2], number, -1).transpose(1, 2)


class Site(nn.Module):
    """Attention of 4 heads over 2 key heads; `bias` of q, k and v; how the parts are used."""

    def __init__(self, bias: tuple[bool, bool, bool], use: str = "plain") -> None:
        super().__init__()
        self.use = use
        self.q = nn.Linear(24, 32, bias[0])
        self.k, self.v = (nn.Linear(24, 16, b) for b in bias[1:])
        self.o = nn.Linear(32, 24)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        source = memory if self.use == "cross" else x
        q, k = self.q(x), self.k(source)
        v = self.k(source * 2) if self.use == "shared" else self.v(source)
        if self.use == "turned":
            q, k = q * q.cos(), k * k.cos()
        y = F.scaled_dot_product_attention(heads(q, 4), heads(k, 2), heads(v, 2), enable_gqa=True)
        y = self.o(y.transpose(1, 2).reshape(*x.shape[:2], 32))
        return y + q.sum() if self.use == "seen" else y


@pytest.mark.parametrize(
    ("bias", "use", "products"),
    [
        ((True, True, True), "plain", 2),
        ((False, False, False), "plain", 2),
        ((True, False, False), "plain", 3),  # k and v alone
        ((True, False, True), "plain", 3),  # q and v alone
        ((True, True, True), "cross", 3),  # k and v read the memory
        ((True, True, True), "turned", 4),  # q and k are changed first; v is alone then
        ((True, True, True), "seen", 3),  # the queries are read elsewhere too
        ((True, True, True), "shared", 4),  # a weight used twice stays stored once
    ],
)
def test_products_of_a_site(bias: tuple[bool, bool, bool], use: str, products: int) -> None:
    model, given = Site(bias, use).eval(), (torch.randn(2, 9, 24), torch.randn(2, 9, 24))
    traced = canonicalise(trace(model, given))
    sites = find(traced).sites
    rewritten = substitute(traced, sites, plan_by_rules(sites, {"*": "exact"}))
    result = lowered(model, given, exported=seal(rewritten))
    with torch.no_grad():
        want = model(*given).numpy()
    np.testing.assert_allclose(run(result, given)[0], want, atol=2e-5)
    assert sum(k.count for k in result.kernels if k.scheduled_by == "dense") == products
    moving = ("split", "slice", "transpose")
    assert not any(word in k.name for k in result.kernels for word in moving)
