"""Closed operation counts against kernels written out one number at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from passes.form import Form, form_named
from passes.forms import _linear, elu, hedgehog
from passes.opcount import OpCount
from passes.site import AttentionSite, Dims
from tests.by_hand import site
from tests.forms.scalar import Rows, Scalar, rows


class Run:
    """A form at a site: the scalar kernel next to the eager one."""

    def __init__(self, form: Form, at: AttentionSite) -> None:
        self.form, self.site, self.scalar = form, at, Scalar()
        d = at.dims
        self.q, self.k = torch.randn(d.B, d.H, d.T, d.D).double(), torch.randn(d.B, d.G, d.S, d.D)
        self.k, self.v = self.k.double(), torch.randn(d.B, d.G, d.S, d.E).double()
        self.params = {
            n: p.double() + 0.3 * torch.randn(p.shape).double()
            for n, p in form.init_params(at).items()
        }
        self.key_mask = torch.rand(d.B, d.S) > 0.4 if at.mask.padding else None
        self.bias = torch.randn(d.B, d.H, d.T, d.S).double() if at.mask.bias else None

    def eager(self) -> Tensor:
        spec = self.form.spec(self.site)
        return self.form.attend(spec, self.params, self.q, self.k, self.v, self.key_mask, self.bias)

    def by_scalar(self) -> Tensor:
        d = self.site.dims
        out = torch.full((int(d.B), d.H, int(d.T), d.E), float("nan")).double()
        for b in range(int(d.B)):
            for g in range(d.G):
                heads = range(g * d.H // d.G, (g + 1) * d.H // d.G)
                for h, result in zip(heads, self.group(b, g, heads), strict=True):
                    out[b, h] = torch.tensor(result, dtype=torch.float64)
        return out

    def group(self, b: int, g: int, heads: range) -> list[Rows]:
        if self.form.name == "exact":
            return [self.softmax(b, g, h) for h in heads]
        fk = self.features(rows(self.k[b, g]), "w_k", g)
        fq = [self.features(rows(self.q[b, h]), "w_q", h) for h in heads]
        if self.key_mask is not None:
            keep = self.key_mask[b].double().tolist()
            fk = [[self.scalar.mul(x, m) for x in r] for r, m in zip(fk, keep, strict=True)]
        v = rows(self.v[b, g])
        eps = {"elu": elu.EPS, "hedgehog": hedgehog.EPS}[self.form.name]
        if not self.site.mask.causal:
            return self.scalar.linear(fq, fk, v, eps)
        return self.scalar.causal(fq, fk, v, _linear.CHUNK, eps)

    def features(self, x: Rows, weight: str, index: int) -> Rows:
        if self.form.name == "elu":
            return self.scalar.elu1(x)
        y = self.scalar.project(x, rows(self.params[weight][index]), self.site.scale**0.5)
        return self.scalar.softmax_pair(y)

    def softmax(self, b: int, g: int, h: int) -> Rows:
        mask, d = self.site.mask, self.site.dims
        seen = None
        if mask.causal or self.key_mask is not None:
            keep = torch.ones(d.T, d.S, dtype=torch.bool)
            keep = keep.tril(int(d.S) - int(d.T)) if mask.causal else keep
            keep = keep if self.key_mask is None else keep & self.key_mask[b]
            seen = keep.tolist()
        bias = None if self.bias is None else rows(self.bias[b, h])
        q, k, v = rows(self.q[b, h]), rows(self.k[b, g]), rows(self.v[b, g])
        return self.scalar.softmax(q, k, v, scale=self.site.scale, seen=seen, bias=bias)


SITES: dict[str, dict[str, Any]] = {
    "none": {},
    "grouped": {"H": 4, "G": 2, "scale": 1.0},
    "cross": {"T": 3, "S": 5, "E": 2},
    "padding": {"padding": True},
    "causal": {"causal": True, "T": 7, "H": 2, "G": 1},
    "causal+padding": {"causal": True, "padding": True, "T": 8},
    "causal, older keys": {"causal": True, "T": 4, "S": 9, "padding": True},
    "causal, blind queries": {"causal": True, "T": 8, "S": 5},
    "bias": {"bias": True},
}
PAIRS = [
    (name, facts)
    for name in ("exact", "elu", "hedgehog")
    for facts in SITES
    if form_named(name).applies(site(**SITES[facts]))
]


@pytest.mark.parametrize(("name", "facts"), PAIRS)
def test_closed_counts(name: str, facts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "CHUNK", 3)  # several chunks, the last one not full
    small = {"B": 2, "H": 2, "T": 5, "D": 3, **SITES[facts]}
    run = Run(form_named(name), site(**small))
    torch.testing.assert_close(run.by_scalar(), run.eager(), rtol=1e-9, atol=1e-9)
    counted = {op: n for op, n in run.scalar.count.items() if n}
    closed = run.form.ops(run.site)
    assert {op: n for op, _, n in closed} == counted
    assert {dtype for _, dtype, _ in closed} == {"float32"}


@pytest.mark.parametrize("name", ["exact", "elu", "hedgehog"])
def test_bytes_and_types(name: str) -> None:
    form = form_named(name)
    wide, half = (form.ops(site(dtype=t, T=16, D=4)) for t in ("float64", "bfloat16"))
    assert wide.bytes_read == 4 * half.bytes_read
    assert wide.bytes_written == 4 * half.bytes_written
    assert {dtype for _, dtype, _ in wide} == {"float64"}
    assert {dtype for _, dtype, _ in half} == {"float32"}  # 16-bit data is summed in float32


def test_bytes_of_exact_by_hand() -> None:
    count = form_named("exact").ops(site(B=2, H=4, G=2, T=3, S=5, D=8, E=6, padding=True))
    q, k, v, mask, out = 2 * 4 * 3 * 8, 2 * 2 * 5 * 8, 2 * 2 * 5 * 6, 2 * 5, 2 * 4 * 3 * 6
    assert count.bytes_read == 4 * (q + k + v) + mask
    assert count.bytes_written == 4 * out


def test_bytes_of_elu_by_hand() -> None:
    count = form_named("elu").ops(site(B=1, H=2, G=1, T=3, S=5, D=8, E=6))
    q, k, v, out = 2 * 3 * 8, 5 * 8, 5 * 6, 2 * 3 * 6
    assert count.bytes_read == 4 * (q + k + v)  # features stay out of memory
    assert count.bytes_written == 4 * out


def test_bytes_of_hedgehog_by_hand() -> None:
    form = form_named("hedgehog", {"feature_dim": 7})
    count = form.ops(site(B=1, H=2, G=1, T=3, S=5, D=8, E=6, padding=True))
    q, k, v, out, weights = 2 * 3 * 8, 5 * 8, 5 * 6, 2 * 3 * 6, (2 + 1) * 8 * 7
    assert count.bytes_read == 4 * (q + k + v + weights) + 5
    assert count.bytes_written == 4 * out


def test_linear_forms_grow_linearly_and_exact_quadratically() -> None:
    def total(name: str, tokens: int) -> int:
        return form_named(name).ops(site(B=1, T=tokens, D=64)).total()

    for name in ("elu", "hedgehog"):
        assert total(name, 2048) == pytest.approx(2 * total(name, 1024), rel=1e-2)
    assert total("exact", 2048) == pytest.approx(4 * total("exact", 1024), rel=1e-2)
    assert total("hedgehog", 4096) < total("exact", 4096)


@pytest.mark.parametrize("name", ["exact", "elu", "hedgehog"])
def test_dynamic_dims_have_no_count(name: str) -> None:
    at = site()
    dynamic = AttentionSite("a#0", "n", Dims("batch", 4, 4, 7, 7, 8, 8), "float32", 1.0, at.mask)
    with pytest.raises(ValueError, match="static dims"):
        form_named(name).ops(dynamic)
    static = AttentionSite("a#0", "n", dynamic.dims.static({"batch": 2}), "float32", 1.0, at.mask)
    assert isinstance(form_named(name).ops(static), OpCount)
