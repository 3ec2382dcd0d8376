"""torch's own modules, other dtypes, dropout, cross attention, dynamic sizes, ids."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.canonicalise import canonicalise
from passes.find import find
from passes.site import Mask
from passes.trace import trace
from passes.traced import Traced
from tests.match.spellings import SCALE, Attention, B, D, H, T, back, heads
from tests.match.test_spellings import SDPA, export, inputs

E = H * D


def both(traced: Traced, *args: object) -> Traced:
    """Canonical graph, compared with the traced one on `args`."""
    canonical = canonicalise(traced)
    torch.testing.assert_close(canonical.module(*args), traced.module(*args), rtol=1e-5, atol=1e-6)
    return canonical


class SelfMHA(nn.Module):
    def __init__(self, weights: bool, batch_first: bool = True, used: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=batch_first)
        self.weights, self.used = weights, used

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out, weights = self.attention(x, x, x, key_padding_mask=hidden, need_weights=self.weights)
        return (out, weights) if self.used else out


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention(weights: bool, batch_first: bool) -> None:
    hidden = torch.zeros(B, T, dtype=torch.bool)
    hidden[1, 4:] = True
    x = torch.randn(B, T, E) if batch_first else torch.randn(T, B, E)
    traced = trace(SelfMHA(weights, batch_first).train(), (x, hidden))
    (site,) = find(both(traced, x, hidden)).sites
    assert site.id == "attention#0"
    assert site.mask == Mask(padding=True)
    assert site.scale == pytest.approx(SCALE)
    assert (site.dims.B, site.dims.H, site.dims.T, site.dims.S) == (B, H, T, T)
    assert not site.cross
    assert site.source.startswith("test_modules.py:")


def test_weights_that_are_returned_are_a_near_miss() -> None:
    args = (torch.randn(B, T, E), torch.zeros(B, T, dtype=torch.bool))
    found = find(trace(SelfMHA(True, used=True).train(), args))
    assert not found.sites
    assert "used elsewhere" in found.near_misses[0].reason


def test_fast_path_is_named() -> None:
    model = nn.TransformerEncoderLayer(E, H, 8, batch_first=True).eval()
    x = torch.randn(B, T, E)
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        with torch.no_grad():
            traced = export(model, (x,))
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
    opaque = [n for n in traced.module.graph.nodes if "encoder_layer_fwd" in n.name]
    found = find(traced)
    if opaque:
        assert not found.sites
        assert "set_fastpath_enabled(False)" in found.near_misses[0].reason
    else:
        assert len(found.sites) == 1


@pytest.mark.parametrize("training", [False, True])
def test_transformer_encoder(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 8, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(B, T, E)
    found = find(both(trace(model, (x,)), x))
    assert [s.id for s in found.sites] == ["layers.0.self_attn#0", "layers.1.self_attn#0"]
    assert not found.near_misses


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, E) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x).view(B, -1, H, D).transpose(1, 2)
        k = self.k(memory).view(B, -1, H, D).transpose(1, 2)
        v = self.v(memory).view(B, -1, H, D).transpose(1, 2)
        return back((q @ k.mT * SCALE).softmax(-1) @ v)


@pytest.mark.parametrize("tokens", [T, 9])
def test_cross(tokens: int) -> None:
    args = torch.randn(B, T, E), torch.randn(B, tokens, E)
    (site,) = find(both(export(Cross(), args), *args)).sites
    assert site.cross
    assert (T, tokens) == (site.dims.T, site.dims.S)


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_is_causal_with_more_keys_is_a_bias() -> None:
    args = torch.randn(B, H, 4, D), torch.randn(B, H, 7, D), torch.randn(B, H, 7, D)
    canonical = both(export(Causal(), args), *args)
    (site,) = find(canonical).sites
    assert site.mask == Mask(bias=True)
    (node,) = [n for n in canonical.module.graph.nodes if n.target is SDPA]
    assert node.args[5] is False
    assert node.args[3].meta["val"].shape == (1, 1, 4, 7)


class Single(nn.Module):
    """One head, three axes, packed projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return torch.bmm((torch.bmm(q, k.transpose(1, 2)) / E**0.5).softmax(-1), v)


def test_one_head_without_an_axis_for_it() -> None:
    x = torch.randn(B, T, E)
    (site,) = find(both(export(Single(), (x,)), x)).sites
    assert (site.dims.B, site.dims.H, site.dims.D) == (B, 1, E)
    assert not site.cross


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return back((q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v)


def test_packed_projection() -> None:
    x = torch.randn(B, T, E)
    (site,) = find(both(export(Packed(), (x,)), x)).sites
    assert (site.dims.B, site.dims.H, site.dims.T, site.dims.D) == (B, H, T, D)


class Windows(nn.Module):
    """Shifted windows: a trained relative bias, and a mask for each window."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)
        self.table = nn.Parameter(torch.randn(H, T, T))
        mask = torch.zeros(2, T, T)
        mask[1, :3, 3:] = mask[1, 3:, :3] = -100.0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        q, k, v = self.qkv(x).view(n, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * SCALE + self.table.unsqueeze(0)
        scores = scores.view(n // 2, 2, H, T, T) + self.mask.unsqueeze(1).unsqueeze(0)
        return back(scores.view(-1, H, T, T).softmax(-1) @ v)


def test_shifted_windows() -> None:
    x = torch.randn(6, T, E)
    (site,) = find(both(export(Windows(), (x,)), x)).sites
    assert site.mask == Mask(bias=True)


def test_shifted_windows_with_a_dynamic_batch() -> None:
    x = torch.randn(6, T, E)
    batch = 2 * torch.export.Dim("half", min=1, max=8)
    program = torch.export.export(Windows(), (x,), dynamic_shapes=({0: batch},), strict=False)
    module = program.module(check_guards=False)
    canonical = both(Traced(module, (x,), {}, {}, "export"), torch.randn(10, T, E))
    assert len(find(canonical).sites) == 1


def causal_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = heads(q, k, v)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    seen = seen & mask[:, None, None, :].bool()
    return back((q @ k.mT * SCALE).masked_fill(~seen, -1e9).softmax(-1) @ v)


def wide_window(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """At the example's 6 tokens this looks causal only."""
    q, k, v = heads(q, k, v)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    seen = (j <= i) & (i - j <= 20)
    return back((q @ k.mT * SCALE).masked_fill(~seen, -1e9).softmax(-1) @ v)


@pytest.mark.parametrize(
    ("spelling", "mask"),
    [
        (causal_padding, Mask(causal=True, padding=True)),
        (wide_window, Mask(causal=True, window=(20, 0))),
    ],
)
def test_dynamic_sizes(spelling, mask: Mask) -> None:
    names = {0: "batch", 1: "tokens"}
    x, keys = inputs()
    traced = trace(
        Attention(spelling).eval(),
        {"x": x, "mask": keys},
        dynamic_shapes={"x": names, "mask": names},
    )
    canonical = canonicalise(traced)
    (site,) = find(canonical).sites
    assert (site.dims.B, site.dims.T, site.dims.S) == ("batch", "tokens", "tokens")
    assert site.mask == mask
    assert not site.cross
    args = {"x": torch.randn(3, 11, E), "mask": torch.ones(3, 11, dtype=torch.long)}
    torch.testing.assert_close(canonical.module(**args), traced.module(**args))


def test_repeated_heads_with_dynamic_sizes() -> None:
    def repeated(q, k, v, mask):
        q, k, v = heads(q, k, v)
        b, g, s, d = k.shape
        k, v = (x[:, :, None].expand(b, g, 2, s, d).reshape(b, 2 * g, s, d) for x in (k, v))
        return back((q @ k.transpose(2, 3) * SCALE).softmax(-1) @ v)

    x, mask = inputs()
    names = {0: "batch", 1: "tokens"}
    traced = trace(
        Attention(repeated, groups=2).eval(),
        {"x": x, "mask": mask},
        dynamic_shapes={"x": names, "mask": None},
    )
    canonical = canonicalise(traced)
    (site,) = find(canonical).sites
    assert (site.dims.B, site.dims.G, site.dims.T) == ("batch", 2, "tokens")
    longer = torch.randn(3, 11, E)
    torch.testing.assert_close(canonical.module(longer, mask), traced.module(longer, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_a_softmax_in_float32(dtype: torch.dtype) -> None:
    def upcast(q, k, v, mask):
        q, k, v = heads(q, k, v)
        hidden = (1 - mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
        scores = (q @ k.mT * SCALE + hidden).float()
        return back(F.softmax(scores, dim=-1).to(v.dtype) @ v)

    x, mask = inputs()
    args = (x.to(dtype), mask)
    traced = export(Attention(upcast).to(dtype).eval(), args)
    canonical = canonicalise(traced)
    (site,) = find(canonical).sites
    assert site.dtype == str(dtype).removeprefix("torch.")
    assert site.mask == Mask(padding=True)
    want = traced.module(*args)
    torch.testing.assert_close(canonical.module(*args), want, rtol=2e-2, atol=2e-2)


def test_dropout_is_kept_in_training() -> None:
    def dropped(q, k, v, mask):
        q, k, v = heads(q, k, v)
        return back(F.dropout((q @ k.mT * SCALE).softmax(-1), 0.25) @ v)

    args = inputs()
    canonical = canonicalise(export(Attention(dropped).train(), args))
    (site,) = find(canonical).sites
    (node,) = [n for n in canonical.module.graph.nodes if n.target is SDPA]
    assert site.dropout == node.args[4] == 0.25


class Twice(nn.Module):
    """Two attentions in one module, the module used twice, and a query that others use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention(self.two).eval()

    @staticmethod
    def two(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = heads(q, k, v)
        first = (q @ k.mT * SCALE).softmax(-1) @ v
        return back((q @ first.mT * SCALE).softmax(-1) @ v + q)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(self.inner(x, mask), mask)


def test_ids_are_unique_and_survive_a_second_trace() -> None:
    args = inputs()
    model = Twice()
    first, second = (find(both(export(model, args), *args)) for _ in range(2))
    assert [s.id for s in first.sites] == [f"inner#{i}" for i in range(4)]
    assert [s.id for s in first.sites] == [s.id for s in second.sites]


def test_canonical_graph_is_stable() -> None:
    args = inputs()
    once = canonicalise(export(Twice(), args))
    again = canonicalise(once)
    assert [s.to_json() for s in find(once).sites] == [s.to_json() for s in find(again).sites]


def test_a_dynamic_batch_of_one_keeps_its_padding_mask() -> None:
    """The trace doubles a dynamic axis of size one; masks must be judged at that size too."""
    from rewriter.api import find_sites
    from rewriter.models import load_model

    loaded = load_model("minilm", tokens=24)
    _, found = find_sites(loaded.model, loaded.example_inputs, dynamic_shapes="auto")
    assert [s.mask.kind for s in found.sites] == ["padding"] * 6
