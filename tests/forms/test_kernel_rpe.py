"""kernel_rpe: the convolution is the direct sum, and a site's own bias is what it multiplies by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import passes.forms.kernel_rpe as module
from passes.errors import UsageError
from passes.form import Reason, form_named
from passes.forms._linear import linear_attention
from passes.relative import differences, places
from passes.site import AttentionSite
from tests.by_hand import site
from tests.targets.kit_tools import Case, Trial, with_target

LOWEST = torch.finfo(torch.float64).min


class Tensors:
    """Random inputs of a site in float64, with the site's own relative bias."""

    def __init__(self, where: AttentionSite, **options: Any) -> None:
        self.form = form_named("kernel_rpe", options)
        assert self.form.applies(where)
        d, mask = where.dims, where.mask
        self.spec = self.form.spec(where)
        self.params = {
            n: (p + 0.3 * torch.randn_like(p)).double()
            for n, p in self.form.init_params(where).items()
        }
        sizes = ((d.B, d.H, d.T, d.D), (d.B, d.G, d.S, d.D), (d.B, d.G, d.S, d.E))
        self.q, self.k, self.v = (torch.randn(*s, dtype=torch.float64) for s in sizes)
        self.hidden = torch.rand(int(d.B), int(d.S)) < 0.3
        self.hidden[:, 0] = False
        self.key_mask, self.bias = ~self.hidden if mask.padding else None, None
        if mask.bias:
            assert mask.relative is not None
            grid = mask.relative if len(mask.relative) > 1 else None
            at = places(grid, int(d.T), int(d.S))
            self.table = torch.randn(d.H, differences(grid, int(d.T), int(d.S)))
            self.bias = self.table.double()[:, at][None].masked_fill(
                self.hidden[:, None, None], LOWEST
            )

    def attend(self, **swap: Any) -> torch.Tensor:
        names = ("q", "k", "v", "key_mask", "bias")
        given = {**{n: getattr(self, n) for n in names}, **swap}
        return self.form.attend(self.spec, given.pop("params", self.params), **given)


SITES = {
    "plain": site(T=21, G=2),
    "padding": site(T=21, padding=True),
    "causal": site(T=21, causal=True),
    "causal, older keys": site(T=9, S=21, causal=True, padding=True),
    "bias": site(T=21, G=2, bias=True, relative=(20,)),
    "grid": site(T=12, bias=True, relative=(3, 4)),
}


@pytest.mark.parametrize("map_", module.MAPS)
@pytest.mark.parametrize("name", SITES)
def test_fourier_transforms_give_the_direct_sum(
    name: str, map_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Tensors(SITES[name], map=map_, reach=5)
    direct = case.attend()
    monkeypatch.setattr(module, "LONG", 1)
    monkeypatch.setattr(module, "WIDE", 2000)  # some features at a time
    torch.testing.assert_close(case.attend(), direct, rtol=1e-9, atol=1e-9)


def test_it_is_the_formula() -> None:
    case = Tensors(SITES["bias"], map="elu")
    b, t, group = case.bias, 21, 2
    assert b is not None
    phi = [torch.nn.functional.elu(x) + 1 for x in (case.q, case.k)]
    want = torch.zeros_like(case.q)
    offset, reach = case.params["offset"], case.params["offset"].shape[1] // 2
    for n, h, i in np.ndindex(2, 4, t):
        seen = [j for j in range(t) if not case.hidden[n, j]]
        weights = torch.stack(
            [
                (phi[0][n, h, i] @ phi[1][n, h // group, j])
                * (b[n, h, i, j] + offset[h, j - i + reach]).exp()
                for j in seen
            ]
        )
        want[n, h, i] = (weights / weights.sum()) @ case.v[n, h // group, seen]
    torch.testing.assert_close(case.attend(), want, rtol=1e-10, atol=1e-10)


def test_without_offsets_it_is_linear_attention() -> None:
    case = Tensors(SITES["causal"], map="elu")
    params = {n: torch.zeros_like(p) for n, p in case.params.items()}
    phi = [torch.nn.functional.elu(x) + 1 for x in (case.q, case.k)]
    want = linear_attention(*phi, case.v, causal=True)
    torch.testing.assert_close(case.attend(params=params), want, rtol=1e-10, atol=1e-10)


def test_gradients_reach_the_sites_own_table() -> None:
    case = Tensors(SITES["bias"])
    table = case.table.double().requires_grad_()
    bias = table[:, places(None, 21, 21)][None]
    case.attend(bias=bias).square().sum().backward()
    assert table.grad is not None
    assert (table.grad != 0).all()


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (site(bias=True), Reason.MASK_BIAS),
        (site(unknown=True), Reason.MASK_UNKNOWN),
        (site(window=(2, 2)), Reason.MASK_WINDOW),
        (site(T=4, S=6), Reason.CROSS),
        (replace(site(), cross=True), Reason.CROSS),
    ],
)
def test_refusals(where: AttentionSite, reason: Reason) -> None:
    verdict = form_named("kernel_rpe").applies(where)
    assert not verdict
    assert verdict.reason is reason


@pytest.mark.parametrize("options", [{"map": "relu"}, {"reach": 0}, {"features": -1}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        form_named("kernel_rpe", options)


@pytest.mark.parametrize("map_", module.MAPS)
@pytest.mark.parametrize(("tokens", "relative"), [(40, (30,)), (12, (3, 4))])
def test_the_kernel_takes_the_bias(tokens: int, relative: tuple[int, ...], map_: str) -> None:
    where = site(H=4, G=2, T=tokens, D=16, bias=True, relative=relative)
    case = Tensors(where, map=map_)
    assert case.bias is not None
    arrays = {n: getattr(case, n).float().numpy() for n in ("q", "k", "v")}
    arrays["bias"] = case.bias.clamp_min(torch.finfo(torch.float32).min).float().numpy()
    params = {n: p.float().numpy() for n, p in case.params.items()}
    trial = Trial(case.form, _Site(where), arrays, params)
    built = trial.build()
    want = case.attend().numpy()
    np.testing.assert_allclose(trial.run(built), want, atol=1e-4, rtol=0)
    assert all(k.scheduled_by for k in built.kernels)


@pytest.mark.parametrize(("tokens", "relative"), [(40, (30,)), (12, (3, 4))])
def test_the_count_with_a_bias(tokens: int, relative: tuple[int, ...]) -> None:
    where = site(B=1, H=4, G=2, T=tokens, D=16, bias=True, relative=relative)
    case = Tensors(where)
    assert case.bias is not None
    arrays = {n: getattr(case, n).float().numpy() for n in ("q", "k", "v", "bias")}
    params = {n: p.float().numpy() for n, p in case.params.items()}
    built = Trial(case.form, _Site(where), arrays, params).build()
    got, want = built.ops, case.form.ops(where)
    assert {(o, d): n for o, d, n in got} == {(o, d): n for o, d, n in want}
    assert (got.bytes_read, got.bytes_written) != (0, 0)


class _Site(Case):
    """A case with a site of its own."""

    def __init__(self, where: AttentionSite) -> None:
        super().__init__()
        object.__setattr__(self, "_where", where)

    @property
    def site(self) -> AttentionSite:
        where: AttentionSite = vars(self)["_where"]
        return where


def blocks(
    tokens: int, hidden: str = "", *, reach: int = 10, causal: bool = False, rows: int = 0
) -> tuple[Trial, np.ndarray]:
    """A trial with blocks of 16 tokens, and what torch says of it."""
    where = site(
        B=1 if hidden == "none" else 2, H=4, G=2, T=tokens, D=12, E=20, causal=causal,
        padding=rows > 0, bias=bool(hidden), relative=(reach,) if hidden else None,
    )  # fmt: skip
    case = Tensors(where, reach=8)
    case.key_mask = None if not rows else torch.rand(rows, tokens) < 0.6
    if hidden:
        table = case.table.double()
        table[:, tokens - 1 + reach :] = table[:, -1:]
        table[:, : tokens - reach] = table[:, :1]
        bias = table[:, places(None, tokens, tokens)][None]
        seen = torch.ones(2, tokens, dtype=torch.bool)
        seen[0, tokens // 2 :] = seen[1, :20] = False
        if hidden == "padding":
            bias = bias.masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
        elif hidden == "causal":
            ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            bias = bias.masked_fill(ahead, -torch.inf)
        case.bias = bias
    arrays = {n: getattr(case, n).float().numpy() for n in ("q", "k", "v")}
    if rows:
        assert case.key_mask is not None
        arrays["key_mask"] = case.key_mask.numpy()
    if case.bias is not None:
        arrays["bias"] = case.bias.float().numpy()
    params = {n: p.float().numpy() for n, p in case.params.items()}
    return Trial(case.form, _Site(where), arrays, params), case.attend().numpy()


@pytest.mark.parametrize("tokens", [80, 101])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"causal": True},
        {"rows": 1},
        {"rows": 2, "causal": True},
        {"hidden": "none"},
        {"hidden": "none", "reach": 17},
        {"hidden": "padding"},
        {"hidden": "causal"},
    ],
    ids=str,
)
def test_blocks_are_the_same_and_counted(tokens: int, how: dict[str, Any]) -> None:
    trial, want = blocks(tokens, **how)
    relative = trial.spec.relative
    assert trial.form.block(relative, tokens, tokens) == 16  # type: ignore[attr-defined]
    built = trial.build()
    assert "relative_blocks" in {k.scheduled_by for k in built.kernels}
    np.testing.assert_allclose(trial.run(built), want, atol=2e-5, rtol=0)
    if how.get("hidden") in (None, "none"):
        count = trial.form.ops(trial.case.site)
        assert {(o, d): n for o, d, n in built.ops} == {(o, d): n for o, d, n in count}
        assert built.ops.bytes_written == count.bytes_written


def test_blocks_with_narrow_vectors() -> None:
    trial, want = blocks(85, hidden="padding")
    narrow = with_target(trial, vector_bytes=16)
    np.testing.assert_allclose(narrow.run(), want, atol=2e-5, rtol=0)


def test_a_grid_or_few_tokens_are_not_cut_into_blocks() -> None:
    form = form_named("kernel_rpe", {"reach": 8})
    assert form.block((9, 9), 81, 81) == 0  # type: ignore[attr-defined]
    assert form.block(None, 79, 79) == 0  # type: ignore[attr-defined]
    assert form.block((91,), 479, 479) == 0  # type: ignore[attr-defined]
    assert form.block((91,), 480, 480) == 96  # type: ignore[attr-defined]
