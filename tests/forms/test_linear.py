"""Linear attention: chunked prefix form == masked quadratic form == token recurrence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passes.form import FormSpec
from passes.forms._linear import CHUNK, linear_attention, linear_weights, sizes, visible
from passes.site import AttentionSite, Dims, Mask

LENGTHS = [(1, 1), (CHUNK - 1, CHUNK - 1), (CHUNK, CHUNK), (CHUNK + 1, CHUNK + 1), (150, 150),
           (1, 9), (5, 140), (140, 5), (70, 90)]  # fmt: skip


def features(queries: int, keys: int, heads: int = 4, groups: int = 2) -> tuple[Tensor, ...]:
    fq = torch.rand(2, heads, queries, 6, dtype=torch.double)
    fk = torch.rand(2, groups, keys, 6, dtype=torch.double)
    return fq, fk, torch.randn(2, groups, keys, 3, dtype=torch.double)


def recurrence(fq: Tensor, fk: Tensor, v: Tensor, key_mask: Tensor | None, eps: float) -> Tensor:
    """One token at a time: add the key to the state, then let the query read it."""
    fk, v = (x.repeat_interleave(fq.shape[1] // x.shape[1], 1) for x in (fk, v))
    out = torch.zeros(*fq.shape[:-1], v.shape[-1], dtype=fq.dtype)
    state = torch.zeros(*fq.shape[:2], fq.shape[-1], v.shape[-1], dtype=fq.dtype)
    z = torch.zeros(*fq.shape[:2], fq.shape[-1], dtype=fq.dtype)
    first = fk.shape[2] - fq.shape[2]  # position of the first query
    for j in range(min(first, 0), fk.shape[2]):
        if j >= 0:
            key = fk[:, :, j] if key_mask is None else fk[:, :, j] * key_mask[:, None, j, None]
            state = state + key[..., :, None] * v[:, :, j, None, :]
            z = z + key
        if j >= first:
            row = fq[:, :, j - first]
            top = (row[..., None] * state).sum(-2)
            out[:, :, j - first] = top / (row * z).sum(-1, keepdim=True).clamp_min(eps)
    return out


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("padding", [False, True])
def test_three_ways_agree(queries: int, keys: int, padding: bool) -> None:
    fq, fk, v = features(queries, keys)
    key_mask = torch.rand(2, keys) > 0.4 if padding else None
    got = linear_attention(fq, fk, v, key_mask=key_mask, causal=True)
    weights = linear_weights(fq, fk, FormSpec("any", True, 1.0), key_mask)
    quadratic = weights @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(got, quadratic, rtol=1e-10, atol=1e-10)
    step = recurrence(fq, fk, v, key_mask, 1e-6)
    torch.testing.assert_close(got, step, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding", [False, True])
def test_bidirectional_agrees_with_the_quadratic_form(padding: bool) -> None:
    fq, fk, v = features(7, 90)
    key_mask = torch.rand(2, 90) > 0.4 if padding else None
    got = linear_attention(fq, fk, v, key_mask=key_mask)
    weights = linear_weights(fq, fk, FormSpec("any", False, 1.0), key_mask)
    torch.testing.assert_close(got, weights @ v.repeat_interleave(2, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_permuted_keys_and_groups(causal: bool) -> None:
    fq, fk, v = features(80, 80)
    whole = linear_attention(fq, fk, v, causal=causal)
    expanded = linear_attention(
        fq, fk.repeat_interleave(2, 1), v.repeat_interleave(2, 1), causal=causal
    )
    torch.testing.assert_close(whole, expanded, rtol=1e-12, atol=1e-12)
    order = torch.randperm(80)
    moved = linear_attention(fq, fk[:, :, order], v[:, :, order], causal=causal)
    same = torch.allclose(moved, whole, rtol=1e-10)
    assert same is not causal


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_sums_of_16_bit_data_are_kept_in_float32(dtype: torch.dtype, causal: bool) -> None:
    tokens = 4096  # a float16 sum of 4096 * 40 overflows; a bfloat16 sum stops at 256 ones
    fq, fk = torch.full((1, 1, 8, 1), 1.0), torch.full((1, 1, tokens, 1), 40.0)
    v = torch.full((1, 1, tokens, 1), 3.0)
    out = linear_attention(fq.to(dtype), fk.to(dtype), v.to(dtype), causal=causal)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), torch.full((1, 1, 8, 1), 3.0))


def test_tiny_denominators_are_clamped() -> None:
    fq, fk = torch.full((1, 1, 3, 2), 1e-30), torch.full((1, 1, 3, 2), 1e-30)
    out = linear_attention(fq, fk, torch.ones(1, 1, 3, 2))
    assert out.isfinite().all()
    assert out.abs().max() < 1e-20


def test_visible() -> None:
    assert visible(FormSpec("f", False, 1.0), 3, 3) is None
    seen = visible(FormSpec("f", True, 1.0, (1, 0)), 2, 4)
    assert seen is not None
    assert seen.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_sizes_refuse_names() -> None:
    site = AttentionSite("a#0", "n", Dims(1, 1, 1, "seq", 4, 4, 4), "float32", 1.0, Mask())
    with pytest.raises(ValueError, match="'seq'"):
        sizes(site)
