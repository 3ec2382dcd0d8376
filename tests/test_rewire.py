"""Taking a spatial reduction out: what is found, what it computes then, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PvtV2Config, PvtV2Model, SegformerConfig, SegformerModel

from passes.errors import FormError
from passes.form import form_named
from passes.forms.exact import Exact
from passes.forms.msa import Msa
from passes.plan import Plan, plan_by_rules
from passes.seal import seal
from passes.site import SiteStatus
from passes.substitute import substitute
from rewriter.api import find_sites


class Reduced(nn.Module):
    """Attention with a reduction, keys and values from one packed linear layer."""

    def __init__(self, ratio: int = 2, extra: bool = False) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(12, 12), nn.Linear(12, 24), nn.Linear(12, 12)
        self.reduce, self.norm = nn.Conv2d(12, 12, ratio, ratio), nn.LayerNorm(12)
        self.ratio, self.extra = ratio, extra

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        seen = x
        if self.ratio > 1:
            side = int(n**0.5)
            image = x.transpose(1, 2).reshape(b, c, side, side)
            seen = self.norm(self.reduce(image).flatten(2).transpose(1, 2))
        if self.extra:
            seen = seen + 1.0
        q = self.q(x).view(b, n, 3, 4).transpose(1, 2)
        k, v = self.kv(seen).view(b, -1, 2, 3, 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).reshape(b, n, c))


def built(model: nn.Module, inputs: dict[str, Tensor], form: str, **options: Any) -> Any:
    traced, found = find_sites(model, inputs, **options)
    return traced, found, substitute(traced, found.sites, plan_by_rules(found.sites, {"*": form}))


def test_a_packed_projection_reads_all_tokens() -> None:
    model, x = Reduced().eval(), torch.randn(2, 16, 12)
    _, found, rewritten = built(model, {"x": x}, "msa")
    assert [s.reduced for s in found.sites] == [True]
    assert rewritten.attention(found.sites[0].id).site.dims.S == 16
    model.ratio = 1
    torch.testing.assert_close(rewritten.module(x=x), model(x), rtol=1e-5, atol=1e-5)
    names = {n for n, _ in rewritten.module.named_parameters()}
    assert {"kv.weight", "reduce.weight"} <= names  # kept for a revert


@pytest.mark.parametrize("kind", ["pvt", "segformer", "pvt pooled"])
def test_models_of_transformers(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "segformer":
        model: Any = SegformerModel(SegformerConfig(depths=[1, 1, 1, 1])).eval()
    else:
        config = PvtV2Config(
            depths=[1, 1, 1, 1], image_size=64, linear_attention=kind == "pvt pooled",
            hidden_act="relu" if kind == "pvt pooled" else "gelu",
        )  # fmt: skip
        model = PvtV2Model(config).eval()
    x = torch.randn(1, 3, 64, 64)
    _, found, rewritten = built(model, {"pixel_values": x}, "msa")
    stages = [s.reduced for s in found.sites]
    assert stages == [True, True, kind != "pvt pooled", False]
    for part in model.modules():
        if hasattr(part, "spatial_reduction_ratio"):
            part.spatial_reduction_ratio, part.linear_attention = 1, False
        if hasattr(part, "sequence_reduction_ratio"):
            part.sequence_reduction_ratio = 1
    if kind != "pvt pooled":  # there the third stage has fewer tokens than it is pooled to
        want = model(pixel_values=x).last_hidden_state
        got = rewritten.module(pixel_values=x)["last_hidden_state"]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_revert_brings_the_reduction_back() -> None:
    model, x = Reduced().eval(), torch.randn(2, 16, 12)
    _, found, rewritten = built(model, {"x": x}, "msa")
    site = found.sites[0].id
    assert not torch.allclose(rewritten.module(x=x), model(x), atol=1e-3)
    rewritten.put(site, Exact())
    assert rewritten.plan[site].status is SiteStatus.REVERTED
    torch.testing.assert_close(rewritten.module(x=x), model(x), rtol=1e-5, atol=1e-5)
    assert rewritten.attention(site).site == found.sites[0]
    again = rewritten.put(site, Msa())
    assert again.site.dims.S == 16
    assert not torch.allclose(rewritten.module(x=x), model(x), atol=1e-3)


def test_it_trains_and_seals() -> None:
    model, x = Reduced().eval(), torch.randn(2, 16, 12)
    _, _, rewritten = built(model, {"x": x}, "msa")
    rewritten.module(x=x).square().sum().backward()
    grads = {n for n, p in rewritten.module.named_parameters() if p.grad is not None}
    assert "kv.weight" in grads
    assert "reduce.weight" not in grads
    sealed = seal(rewritten)
    torch.testing.assert_close(sealed.module()(x=x), rewritten.module(x=x))
    assert not any("conv" in str(n.target) for n in sealed.graph.nodes)


def test_a_dynamic_batch_stays_dynamic() -> None:
    model, x = Reduced().eval(), torch.randn(2, 16, 12)
    _, _, rewritten = built(
        model, {"x": x}, "msa", dynamic_shapes={"x": {0: torch.export.Dim("n", max=9)}}
    )
    model.ratio = 1
    y = torch.randn(5, 16, 12)
    torch.testing.assert_close(rewritten.module(x=y), model(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ratio", "extra"), [(1, False), (2, True)])
def test_what_is_not_a_plain_reduction_is_left(ratio: int, extra: bool) -> None:
    _, found, rewritten = built(Reduced(ratio, extra).eval(), {"x": torch.randn(1, 16, 12)}, "msa")
    assert [s.reduced for s in found.sites] == [False]
    choice = rewritten.plan[found.sites[0].id]
    assert choice.status is SiteStatus.KEPT
    assert "already come from all tokens" in choice.why


def test_a_reduction_that_is_not_there_is_an_error() -> None:
    from dataclasses import replace

    traced, found = find_sites(Reduced(1).eval(), {"x": torch.randn(1, 16, 12)})
    site = replace(found.sites[0], reduced=True)
    from passes.plan import choose

    plan = Plan({site.id: choose(form_named("msa"), site, "")})
    with pytest.raises(FormError, match="no spatial reduction was found"):
        substitute(traced, [site], plan)
