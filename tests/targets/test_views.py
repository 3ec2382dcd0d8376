"""Attention read through views of what projections write, against torch on plain tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from tvm import relax

from codegen.strides import view_of
from passes.canonicalise import canonicalise
from passes.find import find
from passes.plan import plan_by_rules
from passes.seal import seal
from passes.substitute import substitute
from passes.trace import trace
from tests.targets.lowering import lowered, run


class Separate(nn.Module):
    """Three projections, as in BERT and ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [f(x).view(*x.shape[:2], 3, 8).transpose(1, 2) for f in (self.q, self.k, self.v)]
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(x.shape)
        return self.o(y)


class Merged(nn.Module):
    """One projection for all three, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 24))


class Chunked(Merged):
    """One projection, cut along the channels, as in GPT-2; causal."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).split(24, -1)
        q, k, v = (p.view(*x.shape[:2], 3, 8).permute(0, 2, 1, 3) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.permute(0, 2, 1, 3).reshape(x.shape))


def transposes(mod: Any) -> int:
    """Kernels that only move data."""
    return sum("transpose" in g.name_hint or "permute" in g.name_hint for g in mod.functions)


@pytest.mark.parametrize("form", ["exact", "hedgehog"])
@pytest.mark.parametrize("kind", [Separate, Merged, Chunked])
def test_no_transpose_is_left_around_an_attention(kind: type[nn.Module], form: str) -> None:
    torch.manual_seed(int(np.random.default_rng().integers(1 << 30)))
    model, x = kind().eval(), torch.randn(2, 6, 24)
    traced = canonicalise(trace(model, (x,)))
    found = find(traced)
    rewritten = substitute(traced, found.sites, plan_by_rules(found.sites, {"*": form}))
    result = lowered(model, (x,), exported=seal(rewritten))
    assert [k.scheduled_by for k in result.kernels if not k.scheduled_by] == []
    assert transposes(result.mod) == 0, result.mod.script()
    with torch.no_grad():
        want = rewritten.module(x)
    np.testing.assert_allclose(run(result, (x,))[0], want.numpy(), atol=2e-5)


def _expr(build: Any) -> tuple[Any, Any]:
    """The value build(builder, x) and what it is a view of, for x [2, 6, 24]."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 6, 24), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            source, view = view_of(builder, build(builder, x))
            out = builder.emit_output(x)
        builder.emit_func_output(out)
    return (x if source.same_as(x) else None), view


CHAINS: dict[str, tuple[Any, Any]] = {
    "heads": (
        lambda x: x.reshape(2, 6, 3, 8).transpose(0, 2, 1, 3),
        lambda r, x: r.permute_dims(r.reshape(x, (2, 6, 3, 8)), [0, 2, 1, 3]),
    ),
    "a slice of the channels": (
        lambda x: x[..., 8:16].reshape(2, 6, 2, 4).transpose(0, 2, 1, 3),
        lambda r, x: r.permute_dims(
            r.reshape(r.strided_slice(x, [2], [8], [16]), (2, 6, 2, 4)), [0, 2, 1, 3]
        ),
    ),
    "every other token, counted from the end": (
        lambda x: x[:, -5::2].reshape(2, 3, 3, 8).transpose(0, 2, 1, 3),
        lambda r, x: r.permute_dims(
            r.reshape(r.strided_slice(x, [1], [-5], [6], [2]), (2, 3, 3, 8)), [0, 2, 1, 3]
        ),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_view_reads_the_same_elements(name: str) -> None:
    by_numpy, by_relax = CHAINS[name]
    x = np.arange(2 * 6 * 24).reshape(2, 6, 24)
    source, view = _expr(lambda builder, v: builder.emit(by_relax(relax.op, v)))
    want = by_numpy(x)
    assert source is not None
    assert view.shape == want.shape
    got = [x[tuple(view.index(*at))] for at in np.ndindex(*want.shape)]
    np.testing.assert_array_equal(got, want.reshape(-1))


@pytest.mark.parametrize(
    ("shape", "order"), [((2, 6, 3, 8), (0, 2, 3, 1)), ((1, 12, 3, 8), (0, 2, 1, 3))]
)
def test_what_no_view_reads_is_read_from_its_copy(shape: Any, order: Any) -> None:
    """A stride in the last axis; tokens of two batches in a row."""
    source, view = _expr(
        lambda b, x: b.emit(relax.op.permute_dims(relax.op.reshape(x, shape), order))
    )
    assert source is None
    assert view.index(1, 2, 3, 4) == [1, 2, 3, 4]
