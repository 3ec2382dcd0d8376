"""What a bias depends on is found from its values, and a product with it is a convolution."""

from __future__ import annotations

import pytest
import torch

from passes.canonicalise import canonicalise
from passes.find import find
from passes.relative import (
    by_difference,
    differences,
    find_relative,
    places,
    relative_product,
)
from passes.site import AttentionSite
from passes.trace import trace
from tests.zoo import text, vision

LOWEST = torch.finfo(torch.float32).min


def toeplitz(table: torch.Tensor, tokens: int) -> torch.Tensor:
    return table[..., places(None, tokens, tokens)][None]


def padded(tokens: int, hidden: float) -> torch.Tensor:
    mask = torch.zeros(3, 1, 1, tokens)
    mask[1, ..., tokens // 2 :] = hidden
    mask[2, ..., torch.rand(tokens) < 0.4] = hidden
    return mask


@pytest.mark.parametrize("hidden", [LOWEST, -torch.inf, -1e9])
def test_a_line_and_its_reach_are_found_under_padding(hidden: float) -> None:
    table = torch.randn(2, 23)
    assert find_relative([toeplitz(table, 12)]) == (11,)
    table[:, 11 + 4 :] = table[:, -1:]
    table[:, : 12 - 3] = table[:, :1]
    bias = toeplitz(table, 12)
    assert find_relative([bias, bias + padded(12, hidden)]) == (4,)
    causal = torch.full((12, 12), hidden).triu(1)
    assert find_relative([bias + causal]) == (3,)


def test_a_grid_is_found_and_other_biases_are_not() -> None:
    bias = torch.randn(2, 5 * 7)[:, places((3, 4), 12, 12)][None]
    assert find_relative([bias, bias + padded(12, -1e9)]) == (3, 4)
    apart = torch.zeros(12, 12)
    apart[:6, 6:] = apart[6:, :6] = -100.0  # the regions of a shifted window
    assert find_relative([bias + apart]) is None
    assert find_relative([torch.randn(1, 2, 12, 12)]) is None
    assert find_relative([torch.randn(1, 2, 12, 9)]) is None
    assert find_relative([]) is None


def test_the_table_of_a_bias_is_read_past_hidden_keys() -> None:
    table = torch.randn(2, 23)
    mask = torch.zeros(12)
    mask[0] = mask[11] = mask[5] = LOWEST
    got = by_difference(toeplitz(table, 12) + mask, None)[0]
    shown = got > LOWEST / 2
    torch.testing.assert_close(got[shown], table[shown], rtol=0, atol=0)
    assert shown[:, 2:20].all()


@pytest.mark.parametrize(
    ("grid", "queries", "keys"), [(None, 9, 9), (None, 6, 11), ((3, 5), 15, 15)]
)
def test_a_convolution_is_the_direct_product(
    grid: tuple[int, ...] | None, queries: int, keys: int
) -> None:
    c = torch.rand(2, differences(grid, queries, keys), dtype=torch.float64)
    x = torch.randn(2, keys, 3, dtype=torch.float64)
    direct = c[:, places(grid, queries, keys)] @ x
    torch.testing.assert_close(relative_product(c, x, grid), direct, rtol=1e-12, atol=1e-12)


def sites(name: str) -> tuple[AttentionSite, ...]:
    zoo = {entry.name: entry for entry in (*text.ENTRIES, *vision.ENTRIES)}
    model, inputs = zoo[name].make("sdpa")
    return find(canonicalise(trace(model.eval(), inputs))).sites


def test_t5_and_swin_tell_what_their_biases_depend_on() -> None:
    # Seven tokens: the last bucket is not reached before the last distance.
    encoder, decoder = (
        {s.mask.relative for s in sites("T5 encoder and decoder") if s.mask.bias and part in s.id}
        for part in ("encoder", "decoder")
    )
    assert encoder == {(6,)}
    assert decoder == {(6,)}
    # The shifted windows of the second block hide parts of a window.
    found = [s.mask.relative for s in sites("Swin")]
    assert found == [(4, 4), None, (4, 4), None]
    again = AttentionSite.from_json(sites("Swin")[0].to_json())
    assert again.mask.relative == (4, 4)
