"""Every spelling of attention is found with its facts; the canonical graph computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from passes.canonicalise import canonicalise
from passes.find import find
from passes.traced import Traced
from tests.match.spellings import CASES, B, Case, D, H, T

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 4:] = 0
    return torch.randn(B, T, H * D), mask


def export(model: torch.nn.Module, args: tuple) -> Traced:
    module = torch.export.export(model, args, strict=False).module(check_guards=False)
    return Traced(module, args, {}, {}, "export")


def symbolic(model: torch.nn.Module, args: tuple) -> Traced:
    return Traced(fx.symbolic_trace(model), args, {}, {}, "symbolic_trace")


def check(case: Case, traced: Traced, args: tuple) -> None:
    before = traced.module.code
    canonical = canonicalise(traced)
    assert traced.module.code == before
    found = find(canonical)
    assert not found.near_misses, found.near_misses
    (site,) = found.sites
    assert site.mask == case.mask
    assert site.scale == pytest.approx(case.scale)
    assert (case.heads, T, T) == (site.dims.H, site.dims.T, site.dims.S)
    assert (case.groups if case.heads == H else 1) == site.dims.G
    assert (site.dims.D, site.dims.E, site.cross, site.dtype) == (D, D, False, "float32")
    (node,) = [n for n in canonical.module.graph.nodes if n.target is SDPA]
    assert node.meta["attention_site"] == site
    assert site.node == node.name
    assert node.meta["val"].shape == (B * H // case.heads, case.heads, T, D)
    assert not [n for n in canonical.module.graph.nodes if "softmax" in n.name]
    compare(traced.module, canonical.module, args)


def compare(old: fx.GraphModule, new: fx.GraphModule, args: tuple) -> None:
    """Equal outputs and gradients on fresh inputs."""
    x = torch.randn_like(args[0])
    results = []
    for module in (old, new):
        fresh = x.clone().requires_grad_()
        out = module(fresh, *args[1:])
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        params = dict(module.named_parameters())
        leaves = [fresh, *(params[n] for n in sorted(params))]
        grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
        results.append([out.detach(), *(g for g in grads if g is not None)])
    assert len(results[0]) == len(results[1])
    # The gradient of a key bias is zero: errors are relative to the largest gradient.
    size = max(float(g.abs().max()) for g in results[0][1:])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_exported(case: Case) -> None:
    args = inputs()
    check(case, export(case.build(), args), args)


@pytest.mark.parametrize("case", [c for c in CASES if "tril" not in c.name], ids=lambda c: c.name)
def test_symbolic_trace(case: Case) -> None:
    args = inputs()
    try:
        traced = symbolic(case.build(), args)
    except Exception:
        pytest.skip("this spelling can not be traced symbolically")
    check(case, traced, args)
